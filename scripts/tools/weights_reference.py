"""Writes the table of checkpoints in docs/DEPLOYMENT_GUIDE.md, between its two marks, from the registry.

.venv/bin/python -m scripts.tools.weights_reference
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from generation.settings import PROFILES
from generation.weights import Entry
from generation.weights.registry import REGISTRY
from scripts.ops.download_weights import profile_entries
from scripts.tools.generated_section import with_section

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/DEPLOYMENT_GUIDE.md"
BEGIN, END = "   <!-- weights: written by scripts.tools.weights_reference -->", "   <!-- /weights -->"


def table() -> str:
    """Of all that can be fetched: what the default configs need first."""
    models: dict[str, Any] = yaml.safe_load(PROFILES["full"][0].read_text())
    stages = {choice["model"]: stage for stage, choice in models.items() if isinstance(choice, dict)}
    fetched = [entry.name for entry in profile_entries()]
    entries = [entry for entry in REGISTRY.values() if entry.is_downloaded]
    entries.sort(key=lambda entry: entry.name not in fetched)
    lines = ["| name | from | GB | stage in the models file | by default | licence |", "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(_cells(each, stages, each.name in fetched)) + " |" for each in entries]
    return "\n".join(f"   {line}" for line in lines)


def _cells(entry: Entry, stages: dict[str, str], default: bool) -> Iterator[str]:
    yield f"`{entry.name}`"
    yield (entry.repo or str(entry.url)) + (" (gated)" if entry.gated else "")
    yield "not known" if entry.size_gb is None else f"{entry.size_gb}"
    yield f"`{stages[entry.name]}`" if entry.name in stages else "in place of another"
    yield "yes" if default else "no"
    yield entry.licence


def with_table(document: str) -> str:
    """The document with what is true now. Raises ValueError unless it has exactly one place for it."""
    return with_section(document, BEGIN, END, table())


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
