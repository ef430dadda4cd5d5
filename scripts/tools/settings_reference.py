"""Writes every setting of service and miner as Markdown tables into docs/PRODUCTION_CONFIG.md, between its two marks.

.venv/bin/python -m scripts.tools.settings_reference
"""

from __future__ import annotations

from pathlib import Path

from common.settings import TABLES as ORDER
from common.settings import settings_of
from generation import arguments
from neurons.miner import options
from scripts.ops import cluster
from scripts.tools.generated_section import with_section

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
    """The document with what is true now. Raises ValueError unless it has exactly one place for it."""
    return with_section(document, BEGIN, END, reference())


def _default(words: str) -> str:
    if not words:
        return "none"
    return words if words.startswith(("the ", "this ", "by ", "in ")) else f"`{words}`"


if __name__ == "__main__":
    DOCUMENT.write_text(with_reference(DOCUMENT.read_text()))
