"""What Studio is told of the miner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neurons.miner.records.activity import BINS, Activity, Identity
from neurons.miner.records.events import Event
from neurons.miner.records.metrics import Snapshot
from tests.support.ledger_events import NOW, one_task, write


def told(ledger: Path, moment: Snapshot) -> dict[str, Any]:
    answer = Activity(Identity("5Hot", "finney", 17), ledger, lambda: NOW).as_json(moment)
    return dict(json.loads(answer))


def test_what_the_ledger_and_the_moment_say(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    events = one_task(1, NOW - 600, score=0.91, reward=10) + one_task(1, NOW - 300, accepted=False, reward=10)
    write(ledger, events + one_task(2, NOW - 200, score=0.83, reward=20))
    hotkeys = {uid: f"hotkey{uid}" for uid in (1, 2, 3, 4)}  # the last one has not answered
    moment = Snapshot(1, cooldowns={1: 250.0, 3: -1.0}, held=[(2, "image", 12.0)], status="ready", hotkeys=hotkeys)
    said = told(ledger, moment)
    one, two, three = said["validators"]
    assert (one["uid"], one["accepted"], one["submitted"], one["declined"], one["cooldown"]) == (1, 1, 2, 1, 250.0)
    assert (two["uid"], two["mean_score"], two["reward"], two["cooldown"]) == (2, 0.83, 20.0, 0.0)
    assert (three["uid"], three["hotkey"], three["submitted"], three["mean_score"]) == (3, "hotkey3", 0, None)
    assert (said["accepted"], said["declined"], said["reward"], said["mean_score"]) == (2, 1, 30.0, 0.87)
    assert said["held"] == [{"uid": 2, "kind": "image", "age": 12.0}]
    assert [each["outcome"] for each in said["outcomes"]] == ["accepted", "declined", "accepted"]
    assert said["bins"] == [{"accepted": 0, "lost": 0}] * (BINS - 1) + [{"accepted": 2, "lost": 1}]


@pytest.mark.parametrize("before", ["a", "z"])  # whichever the ledger lists first
def test_a_uid_with_a_new_hotkey_starts_anew(tmp_path: Path, before: str) -> None:
    def tasks(hotkey: str, uid: int, at: float, reward: float) -> list[tuple[float, Event]]:
        events = one_task(uid, at, reward=reward)
        return [(at, replace(event, validator=replace(event.validator, hotkey=hotkey))) for at, event in events]

    old, new = f"{before} old", "n new"
    ledger = tmp_path / "ledger.sqlite"
    write(ledger, tasks(old, 1, NOW - 900, 10) + tasks(old, 1, NOW - 600, 11))
    (row,) = told(ledger, Snapshot(cooldowns={1: 5.0}, hotkeys={1: new}))["validators"]
    assert (row["hotkey"], row["submitted"], row["reward"], row["cooldown"]) == (new, 0, None, 5.0)

    write(ledger, tasks(new, 1, NOW - 300, 3))
    for moment in (Snapshot(hotkeys={1: new}), Snapshot()):  # or it is not eligible just now
        said = told(ledger, moment)
        (row,) = said["validators"]
        assert (row["hotkey"], row["submitted"], row["reward"]) == (new, 1, 3.0)
        assert (said["accepted"], said["reward"], len(said["outcomes"])) == (3, 3.0, 3)

    moved = told(ledger, Snapshot(cooldowns={7: 9.0}, hotkeys={1: new, 7: old}))["validators"]
    assert [(row["uid"], row["hotkey"], row["submitted"], row["cooldown"]) for row in moved] == [
        (1, new, 1, 0.0),
        (7, old, 2, 9.0),
    ]


def test_before_there_is_a_ledger(tmp_path: Path) -> None:
    said = told(tmp_path / "ledger.sqlite", Snapshot())
    assert (said["hotkey"], said["network"], said["netuid"]) == ("5Hot", "finney", 17)
    assert (said["validators"], said["outcomes"], said["accepted"], said["mean_score"]) == ([], [], 0, None)
