"""What the miner does and earns, as JSON for Studio, read from the ledger on demand."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neurons.miner.records import standings
from neurons.miner.records.metrics import Snapshot
from neurons.miner.records.standings import Standing
from neurons.miner.records.verdicts import TASK_COOLDOWN_S, WINDOW_S

BINS = 24
MOST_OUTCOMES = 200
# Of a validator's standing.
SHOWN = (
    "uid", "hotkey", "accepted", "submitted", "declined", "early", "mean_score", "reward", "unknown",
    "candidates", "gain",
)  # fmt: skip
#: Seconds for which an answer is reused, so that frequent requests cost the miner nothing.
KEPT_S = 1.0


@dataclass(frozen=True)
class Identity:
    """Who the miner is. `hotkey`: its public address."""

    hotkey: str
    network: str
    netuid: int


class Activity:
    """The miner's activity. For any thread. `now`: unix seconds, the ledger's clock."""

    def __init__(self, identity: Identity, ledger: Path, now: Callable[[], float]) -> None:
        self._identity, self._ledger, self._now = identity, ledger, now
        self._lock = threading.Lock()
        self._cached: tuple[float, bytes] = (-math.inf, b"")

    def as_json(self, moment: Snapshot) -> bytes:
        """The last 4 hours from the ledger, and the current state from `moment`."""
        with self._lock:
            asked_at = time.monotonic()
            if asked_at - self._cached[0] > KEPT_S:
                self._cached = asked_at, json.dumps(self._read(moment), allow_nan=False).encode()
            return self._cached[1]

    def _read(self, moment: Snapshot) -> dict[str, Any]:
        now = self._now()
        found: dict[str, Standing] = {}
        outcomes: list[dict[str, Any]] = []
        first = now
        with suppress(sqlite3.Error), closing(standings.connect(self._ledger)) as ledger:  # none is there yet
            found = standings.standings(ledger, now, WINDOW_S)
            query = "SELECT at, uid, outcome, score, seconds FROM submissions WHERE at > ? AND at <= ? ORDER BY at DESC"
            outcomes = [dict(row) for row in ledger.execute(query, (now - WINDOW_S, now))]
            first = ledger.execute("SELECT min(at) FROM pulls").fetchone()[0] or now
        validators = [
            {key: getattr(each, key) for key in SHOWN} | {"cooldown": max(0.0, moment.cooldowns.get(each.uid, 0.0))}
            for each in _current(found, moment)
        ]
        scores = [each["score"] for each in outcomes if each["outcome"] == "accepted" and each["score"] is not None]
        covered = max(min(WINDOW_S, now - first) / TASK_COOLDOWN_S, 1.0)
        return {
            "at": now,
            "status": moment.status,
            "hotkey": self._identity.hotkey,
            "network": self._identity.network,
            "netuid": self._identity.netuid,
            "uid": moment.uid,
            "incentive": moment.incentive,
            "window_seconds": WINDOW_S,
            "accepted": sum(each.accepted for each in found.values()),
            "declined": sum(each.declined for each in found.values()),
            "unsettled": sum(each.unknown for each in found.values()),
            "ceiling": covered * len(validators),
            "reward": sum(each["reward"] or 0.0 for each in validators),
            "mean_score": sum(scores) / len(scores) if scores else None,
            "clock_behind": moment.clock_behind,
            "queued": moment.queued,
            "held": [{"uid": uid, "kind": kind, "age": age} for uid, kind, age in moment.held],
            "validators": validators,
            "services": dict(moment.endpoints),
            "outcomes": outcomes[:MOST_OUTCOMES],
            "bins": _bins(outcomes, now),
        }


def _current(found: Mapping[str, Standing], moment: Snapshot) -> list[Standing]:
    """One standing for each UID: that of its present hotkey, as another may have had the UID earlier in the window."""
    eligible = set(moment.hotkeys.values())
    past = (each for each in found.values() if each.hotkey not in eligible)
    by_uid = {each.uid: each for each in sorted(past, key=lambda each: each.last_task_at or 0.0)}
    for uid, hotkey in moment.hotkeys.items():
        if hotkey in found or uid in by_uid or uid in moment.cooldowns:
            by_uid[uid] = replace(found.get(hotkey, Standing(uid, hotkey)), uid=uid)
    return [by_uid[uid] for uid in sorted(by_uid)]


def _bins(outcomes: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
    """Results in each 24th of the window, oldest first."""
    width = WINDOW_S / BINS
    bins = [{"accepted": 0, "lost": 0} for _ in range(BINS)]
    for each in outcomes:
        at = bins[min(BINS - 1, int((each["at"] - (now - WINDOW_S)) / width))]
        at["accepted" if each["outcome"] == "accepted" else "lost"] += each["outcome"] != "unknown"
    return bins
