"""The fleet's benchmark, with engines that only sleep: it measures, and no request is lost with an engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts.bench import fleet


@pytest.mark.slow
def test_all_requests_are_answered_though_an_engine_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "figures.json"
    words = f"fleet --stand-in 0.1 --requests 8 --in-flight 8 --engines 2 --kill --json {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    fleet.main()
    (figures,) = json.loads(out.read_text())
    assert (figures["form"], figures["engines"]) == ("process", 2)
    assert [each["status"] for each in figures["health"]] == ["ready", "ready"]
    assert 'generation_engine_up{device="2"} 1.0' in figures["metrics"]
    assert figures["killed"]["answered"] == 8
    assert sorted(each["status"] for each in figures["killed"]["health"]) == ["failed", "ready"]
