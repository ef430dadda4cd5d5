"""Limits the tasks that the miner holds: enough to keep the generators busy, none that would be finished too late."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

# Seconds within which a newly pulled task should be generated. What is left of 300 s is for the submission.
PLANNED_AGE_S = 240.0


class Forecast(Protocol):
    """Knows how fast the generation services are."""

    def expected_seconds(self, tasks: int) -> float | None:
        """Seconds until `tasks` tasks would be finished; None before the first measurement."""


class Place:
    """Room for one task, from before its pull until it is generated."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Admission | None = admission

    def leave(self) -> None:
        """Frees the place: nothing was pulled, or the task is done. Further calls do nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.held -= 1
            admission.admit()


class Admission:
    """Admits pulls in the order of their arrival. `held` counts admitted pulls, and tasks not generated yet."""

    def __init__(self, forecast: Forecast, workers: int) -> None:
        self._forecast = forecast
        self._workers = workers
        self._waiting: deque[asyncio.Future[Place]] = deque()
        self.held = 0

    async def enter(self) -> Place:
        """Waits for room."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self.admit()
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled():
                waiting.result().leave()
            raise

    def enter_at_once(self) -> Place:
        """A place without waiting, for a pull that is expected to bring no new work."""
        self.held += 1
        return Place(self)

    def admit(self) -> None:
        """Admits waiting pulls while there is room."""
        while self._waiting and (self._waiting[0].done() or self._has_room()):
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(self.enter_at_once())

    @property
    def is_full(self) -> bool:
        """Whether the next pull would have to wait."""
        return bool(self._waiting) or not self._has_room()

    def _has_room(self) -> bool:
        if self.held == 0:
            return True
        seconds = self._forecast.expected_seconds(self.held + 1)
        # Until something is measured: one task per worker.
        return self.held < self._workers if seconds is None else seconds <= PLANNED_AGE_S
