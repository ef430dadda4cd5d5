"""The service's benchmark takes any generator that the service does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.bench import service


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["ball", "sculpture"])
def test_generators_of_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: str) -> None:
    """With the tiny pack around them, which draws, cuts out and checks. The table has two more entries there."""
    python = tmp_path / "python"  # PYTHON -m MODULE ARGUMENT...
    python.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -m tests.support.standin_generators "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    config = tmp_path / "config.yaml"
    config.write_text(f"generator: {generator}")
    measured = service.measure("tiny", config, requests=1)
    assert set(measured["stages_s"]) == {"text_to_image", "background", generator, "self_check"}
    assert measured["request_s"] > 0
