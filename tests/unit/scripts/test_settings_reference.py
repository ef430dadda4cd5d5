"""docs/PRODUCTION_CONFIG.md tells every setting as the parsers have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.settings import settings_of
from scripts.tools import settings_reference
from scripts.tools.settings_reference import BEGIN, DOCUMENT, END, TABLES, reference, with_reference

ROOT = Path(__file__).resolve().parents[3]


def test_the_document_is_true() -> None:
    document = (ROOT / DOCUMENT).read_text()
    assert with_reference(document) == document, f"run {settings_reference.__name__}"


def test_every_setting_is_in_it_under_all_its_names() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    settings = settings_of(TABLES)
    assert len(rows) == len(settings) > 25
    for each in settings:
        (row,) = (row for row in rows if f"`{each.variable}`" in row)
        assert f"| `{each.key}` |" in row
        assert all(f"`{flag}`" in row for flag in each.flags)
    (port,) = (row for row in rows if "SERVICE_PORT" in row)
    assert "`10006`" in port
    assert "1..65535" in port
    assert "port to listen on" in port


def test_a_wrong_default_in_the_document_is_noticed() -> None:
    document = (ROOT / DOCUMENT).read_text()
    assert with_reference(document.replace("10006", "10005")) == document


@pytest.mark.parametrize("document", ["", BEGIN, f"{BEGIN}{END}{BEGIN}"])
def test_a_document_without_a_place_is_said(document: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        with_reference(document)
