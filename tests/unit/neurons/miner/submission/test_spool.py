"""Results on disk."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from neurons.miner.submission import spool as spool_module
from neurons.miner.submission.spool import MAX_AGE_S, Spool, SpooledResult, SpoolUnusable, hold
from neurons.protocol import ImageTask, TextTask


def test_spool_round_trip_and_hostile_ids(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for task in (TextTask(id="../../etc/passwd\0", prompt="p\nq"), ImageTask(id="x" * 1000, prompt="aGk=")):
        entry = SpooledResult("5V", task, b"\n\0binary\n")
        spool.put(entry)
        assert spool.get("5V", task) == entry
        assert spool.get("5W", task) is None
        assert spool.get("5V", TextTask(id=task.id, prompt="another")) is None
    assert len(list(tmp_path.rglob("*"))) == 3  # the folder and two files in it
    assert len(spool.entries()) == 2
    spool.remove("5V", "x" * 1000)
    spool.remove("5V", "x" * 1000)
    assert len(spool.entries()) == 1


def test_damaged_and_old_entries_are_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in (1, 2):
        spool.put(SpooledResult("5V", TextTask(id=str(number), prompt="p"), b""))
    old, damaged = sorted(tmp_path.iterdir())
    os.utime(old, (time.time() - MAX_AGE_S - 5,) * 2)
    damaged.write_bytes(b"{}\nx")
    (tmp_path / "half.tmp").write_bytes(b"")
    assert spool.entries() == []
    assert os.listdir(tmp_path) == []


def test_a_result_may_be_answered_while_room_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "MAX_ENTRIES", 1)
    spool = Spool(tmp_path)
    spool.put(SpooledResult("5V", TextTask(id="first", prompt="p"), b""))
    before = spool._files()
    spool.remove("5V", "first")
    monkeypatch.setattr(spool, "_files", lambda: before)
    later = SpooledResult("5V", TextTask(id="later", prompt="p"), b"")
    spool.put(later)
    assert spool.get("5V", later.task) == later


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "spool"
    with pytest.raises(SpoolUnusable) as unusable, hold(folder):
        pass
    assert str(unusable.value) == f"Spool {folder}: Not a directory"
