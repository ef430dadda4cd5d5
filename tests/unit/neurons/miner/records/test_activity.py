"""What Studio is told of the miner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neurons.miner.records.activity import BINS, Activity, Identity
from neurons.miner.records.metrics import Snapshot
from tests.support.ledger_events import NOW, one_task, write


def told(ledger: Path, moment: Snapshot) -> dict[str, Any]:
    answer = Activity(Identity("5Hot", "finney", 17), ledger, lambda: NOW).as_json(moment)
    return dict(json.loads(answer))


def test_what_the_ledger_and_the_moment_say(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    events = one_task(1, NOW - 600, score=0.91, reward=10) + one_task(1, NOW - 300, accepted=False, reward=10)
    write(ledger, events + one_task(2, NOW - 200, score=0.83, reward=20))
    said = told(ledger, Snapshot(queued=1, cooldowns={1: 250.0, 3: -1.0}, held=[(2, "image", 12.0)], status="ready"))
    one, two, three = said["validators"]
    assert (one["uid"], one["accepted"], one["submitted"], one["declined"], one["cooldown"]) == (1, 1, 2, 1, 250.0)
    assert (two["uid"], two["mean_score"], two["reward"], two["cooldown"]) == (2, 0.83, 20.0, 0.0)
    assert (three["uid"], three["hotkey"], three["submitted"], three["mean_score"]) == (3, "", 0, None)
    assert (said["accepted"], said["declined"], said["reward"], said["mean_score"]) == (2, 1, 30.0, 0.87)
    assert said["held"] == [{"uid": 2, "kind": "image", "age": 12.0}]
    assert [each["outcome"] for each in said["outcomes"]] == ["accepted", "declined", "accepted"]
    assert said["bins"] == [{"accepted": 0, "lost": 0}] * (BINS - 1) + [{"accepted": 2, "lost": 1}]


def test_before_there_is_a_ledger(tmp_path: Path) -> None:
    said = told(tmp_path / "ledger.sqlite", Snapshot())
    assert (said["hotkey"], said["network"], said["netuid"]) == ("5Hot", "finney", 17)
    assert (said["validators"], said["outcomes"], said["accepted"], said["mean_score"]) == ([], [], 0, None)
