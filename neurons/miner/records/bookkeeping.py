"""Passes each event on to the ledger, the metrics and the status file's totals. The policy follows the ledger."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from neurons.miner import stopping
from neurons.miner.records import standings
from neurons.miner.records.activity import Activity, Identity
from neurons.miner.records.events import Event, Settlement
from neurons.miner.records.ledger import Ledger
from neurons.miner.records.metrics import Metrics, Snapshot
from neurons.miner.records.policy import Policy
from neurons.miner.records.verdicts import WINDOW_S, PastSubmission
from neurons.miner.validators.clock import MAX_COOLDOWN_S, steady_time

STANDINGS_INTERVAL_S = 60.0

log = logging.getLogger(__name__)


class Bookkeeping:
    """`totals` counts events, such as "submission accepted". `metrics_port` 0: no metrics are served. `identity`: the
    miner, as Studio shows it.
    """

    def __init__(
        self,
        ledger: Path,
        metrics_port: int,
        least_reward: float,
        now: Callable[[], float] = steady_time,
        spool: Path | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.totals: Counter[str] = Counter()
        self.policy = Policy(least_reward)
        self._ledger = Ledger(ledger, now)
        self._metrics = Metrics(spool)
        self._metrics_port = metrics_port
        self._activity = None if identity is None else Activity(identity, ledger, now).as_json
        self._now = now

    def start(self) -> None:
        """Starts writing and serving. If the port is taken, that is only logged."""
        self._ledger.start()
        if self._metrics_port:
            self._metrics.serve(self._metrics_port, self._activity)

    async def close(self) -> None:
        """Writes what is left, within stopping.METRICS_S and LEDGER_S seconds."""
        await asyncio.to_thread(self._metrics.close)
        await asyncio.to_thread(self._ledger.close, stopping.LEDGER_S)

    def record(self, event: Event) -> None:
        """Passes the event on. Returns at once and never raises."""
        if isinstance(event, Settlement):
            if event.outcome != "unknown" and self.totals["submission unknown"] > 0:
                self.totals["submission unknown"] -= 1
                self.totals[f"submission {event.outcome}"] += 1
        else:
            self.totals[f"{type(event).__name__.lower()} {event.outcome}"] += 1
        self._metrics.record(event)
        self._ledger.record(event)

    def show(self, snapshot: Snapshot) -> None:
        """Updates the gauges."""
        self._metrics.show(snapshot)

    def worth_asking_at(self, hotkey: str) -> float:
        """The unix time from which it is worth asking the validator for a task; 0 for right away."""
        return self.policy.ask_at(hotkey)

    @property
    def backlog(self) -> int:
        """Ledger rows not written yet."""
        return self._ledger.backlog

    async def follow_standings(self) -> None:
        """Keeps the policy up to date."""
        while True:
            try:
                # Also before the first task: an earlier run may have learned something.
                if self._ledger.path.exists():
                    self.policy.update(await asyncio.to_thread(standings.read, self._ledger.path, self._now()))
            except (OSError, sqlite3.Error) as error:
                log.warning("Ledger %s can not be read: %s", self._ledger.path, error)
            await asyncio.sleep(STANDINGS_INTERVAL_S)

    async def cooldowns(self) -> dict[str, float]:
        """Hotkey -> unix time until which an earlier run knew that the validator may not be asked."""
        try:
            return await asyncio.to_thread(_cooldowns, self._ledger.path, self._now())
        except sqlite3.Error:
            return {}  # no ledger yet

    async def submissions(self) -> list[PastSubmission]:
        """Submissions of an earlier run that validators may still count, oldest first."""
        try:
            return await asyncio.to_thread(_submissions, self._ledger.path, self._now())
        except sqlite3.Error:
            return []


def _submissions(path: Path, now: float) -> list[PastSubmission]:
    query = """SELECT at, hotkey, task_id, outcome, coalesce(seconds, 0), accepted_in_window, wait, score
        FROM submissions WHERE at > ? AND at <= ? ORDER BY at, id"""
    with closing(standings.connect(path)) as connection:
        return [PastSubmission(*row) for row in connection.execute(query, (now - WINDOW_S, now))]


def _cooldowns(path: Path, now: float) -> dict[str, float]:
    # SQLite takes the columns beside max() from the newest row. A row from the future was written before the clock was
    # set back. When its wait began is not known, so it begins now.
    query = """SELECT hotkey, min(at, :now) + wait, max(at) FROM
        (SELECT hotkey, at, wait FROM pulls UNION ALL SELECT hotkey, at, wait FROM submissions)
        WHERE at >= :now - :longest GROUP BY hotkey"""
    with closing(standings.connect(path)) as connection:
        rows = connection.execute(query, {"now": now, "longest": MAX_COOLDOWN_S}).fetchall()
    return {hotkey: min(until, now + MAX_COOLDOWN_S) for hotkey, until, _ in rows if until is not None and until > now}
