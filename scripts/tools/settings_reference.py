"""Writes every setting of service and miner as Markdown tables into docs/PRODUCTION_CONFIG.md, between its two marks.

.venv/bin/python -m scripts.tools.settings_reference            # writes
.venv/bin/python -m scripts.tools.settings_reference --check    # exit status 1 when the document is not true
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.settings import TABLES as ORDER
from common.settings import settings_of
from generation import arguments
from neurons.miner import options
from scripts.ops import cluster

DOCUMENT = Path("docs/PRODUCTION_CONFIG.md")
BEGIN, END = "<!-- settings: written by scripts.tools.settings_reference -->", "<!-- /settings -->"
TABLES = {**options.TABLES, **arguments.TABLES, **cluster.TABLES}
READ_BY = {
    "network": "miner",
    "wallet": "miner",
    "score": "service and miner",
    "service": "service",
    "miner": "miner",
    "cluster": "deploy script",
}


def reference() -> str:
    """The tables, one for each table of the file."""
    parts = []
    for table in ORDER:
        rows = []
        for each in settings_of({table: TABLES[table]}):
            cells = (
                f"`{each.key}`",
                "<br>".join(f"`{flag}`" for flag in each.flags),
                f"`{each.variable}`",
                _default(each.default_is),
                each.check.limits,
                each.help,
            )
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append(
            f"### `[{table}]`, read by the {READ_BY[table]}\n\n| key | flag | variable | default | value | meaning |\n"
            "|---|---|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts)


def with_reference(document: str) -> str:
    """The document with the tables as they are now. Raises ValueError where it has not exactly one place for them."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"{DOCUMENT} needs {BEGIN} and {END}, once each")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{reference()}\n\n{END}{rest.split(END)[1]}"


def _default(words: str) -> str:
    if not words:
        return "none"
    return words if words.startswith(("the ", "by ", "in ")) else f"`{words}`"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    document = DOCUMENT.read_text()
    new = with_reference(document)
    if parser.parse_args().check:
        return int(new != document)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
