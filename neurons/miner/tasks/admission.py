"""How many tasks the miner holds: as many as keep the generators busy and are finished while still of use."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

# Within which a newly pulled task should be generated; the rest is for the submission and for what was not foreseen.
PLANNED_AGE_S = 240.0
# A validator that takes longer to answer a pull does not keep others from pulling meanwhile.
SLOW_PULL_S = 2.0


class Forecast(Protocol):
    def expected_seconds(self, tasks: int) -> float | None: ...


class Place:
    """Room for one task, from before its pull until it is generated."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._counted = True
        self._lapse = asyncio.get_running_loop().call_later(SLOW_PULL_S, self.leave)

    def fill(self) -> None:
        """The pull brought a task. It counts, even where the room has been given to somebody else meanwhile."""
        self._lapse.cancel()
        if not self._counted:
            self._counted = True
            self._admission.held += 1

    def leave(self) -> None:
        """Nothing was pulled, or the task is done. Harmless when it was called before."""
        self._lapse.cancel()
        if self._counted:
            self._counted = False
            self._admission.held -= 1
            self._admission.admit()


class Admission:
    """Lets pulls through, in the order in which they came. `held` counts tasks pulled and not generated yet."""

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
        """For a pull that is expected to bring no new work."""
        self.held += 1
        return Place(self)

    def admit(self) -> None:
        """To be called when there may be more room than before."""
        while self._waiting and (self._waiting[0].done() or self._has_room()):
            waiting = self._waiting.popleft()
            if not waiting.done():
                self.held += 1
                waiting.set_result(Place(self))

    @property
    def is_full(self) -> bool:
        return bool(self._waiting) or not self._has_room()

    def _has_room(self) -> bool:
        if self.held == 0:
            return True
        seconds = self._forecast.expected_seconds(self.held + 1)
        # Until something is measured: one task per worker.
        return self.held < self._workers if seconds is None else seconds <= PLANNED_AGE_S
