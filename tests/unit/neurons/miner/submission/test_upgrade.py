"""Spool and ledger that 0.1.0 wrote (commit befe06d, its own code) open after an update; a later one's do not."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

from neurons.miner.records.events import Pull
from neurons.miner.records.ledger import SCHEMA_VERSION, Ledger
from neurons.miner.records.standings import connect, standings
from neurons.miner.submission.spool import FORMAT_VERSION, Spool, SpooledResult
from neurons.protocol import TextTask
from tests.support.ledger_events import validator

GOLDEN = Path(__file__).parents[4] / "golden"
HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
TASK = TextTask(id="4c1f", prompt="a red cube")
NAME = "dcea7332fa84cf3ead6a892c264e150bd78649cc4ad8e7e1d64682b99b0b5f01.result"
WRITTEN_AT = 1764460000.0


def spooled(folder: Path) -> Path:
    folder.mkdir()
    (folder / NAME).write_bytes((GOLDEN / "spool_v1.result").read_bytes())  # written just now, as far as its age goes
    return folder


def test_a_result_of_the_first_version_is_handed_in(tmp_path: Path) -> None:
    spool = Spool(spooled(tmp_path / "spool"))
    assert spool.entries() == [(HOTKEY, TASK.id)]
    assert spool.get(HOTKEY, TASK) == SpooledResult(HOTKEY, TASK, b"spz bytes")


def test_a_result_of_a_later_version_is_not_guessed_at(tmp_path: Path) -> None:
    folder = spooled(tmp_path / "spool")
    head, _, result = (folder / NAME).read_bytes().partition(b"\n")
    later = {**json.loads(head), "version": FORMAT_VERSION + 1}
    (folder / NAME).write_bytes(json.dumps(later).encode() + b"\n" + result)
    assert Spool(folder).get(HOTKEY, TASK) is None


def test_what_is_written_says_its_version(tmp_path: Path) -> None:
    Spool(tmp_path).put(SpooledResult(HOTKEY, TASK, b"spz bytes"))
    assert json.loads((tmp_path / NAME).read_bytes().partition(b"\n")[0])["version"] == FORMAT_VERSION


def test_the_ledger_of_the_first_release_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    shutil.copy(GOLDEN / "ledger_v2.sqlite", path)
    ledger = Ledger(path, lambda: WRITTEN_AT + 60.0)
    ledger.start()
    ledger.record(Pull(validator(7), "task", 0.2, "next"))
    ledger.close()
    assert not list(tmp_path.glob("*.damaged"))
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert connection.execute("SELECT count(*) FROM pulls").fetchone() == (2,)
    connection.close()
    connection = connect(path)
    found = standings(connection, WRITTEN_AT + 61.0, 14_400.0)
    connection.close()
    assert found[HOTKEY].accepted == 1
    assert found[HOTKEY].mean_score == 0.75
