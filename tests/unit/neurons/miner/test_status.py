"""The status file on a bad disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from neurons.miner.status import StatusFile


def test_a_status_that_can_not_be_written_is_one_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "neurons.miner.status")
    folder = tmp_path / "run"
    folder.write_text("")
    status = StatusFile(folder / "status", "finney")
    for _ in range(3):
        status.write(validators=2)
    assert [record.getMessage() for record in caplog.records] == [f"Status file {folder}/status: File exists"]
    status.remove()
    folder.unlink()
    status.write(validators=2)
    assert json.loads((folder / "status").read_text())["validators"] == 2
    status.remove()
    assert not list(folder.iterdir())
