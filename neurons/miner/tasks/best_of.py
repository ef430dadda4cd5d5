"""How many candidates a task gets: what fits into the time that costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from neurons.miner.assignment import Assignment

# What one request to a generation service asks for at most, and for how long: a task that comes meanwhile may wait so
# long for a worker.
MAX_CANDIDATES = 64
ROUND_S = 5.0
# Of the planned time of a request, for its splat's way here.
TRANSFER_S = 0.5
# A validator reckons in whole seconds.
MARGIN_S = 1.0
MAX_SUBMISSION_S = 60.0
# Weight of a shorter submission in what the next one is expected to take. A longer one counts at once.
SHORTER_SHARE = 0.3


@dataclass(frozen=True)
class Round:
    """One request to a generation service: so many `candidates` within so many `seconds`."""

    candidates: int
    seconds: float

    @property
    def budget(self) -> float:
        """What the service is given of the seconds."""
        return max(self.seconds - TRANSFER_S, 0.1)


class Capacity(Protocol):
    """Who knows how fast the generation services are."""

    def seconds_without_wait(self) -> float | None:
        """What one task takes on whichever service it comes to; None while nothing is measured."""

    def candidates_within(self, seconds: float, tasks: int) -> int:
        """How many each of so many tasks can have in that time; 0 as well while nothing is measured."""


class BestOf:
    """Plans rounds of candidates. A task's cooldown counts from its assignment, so that it costs nothing to hold it for
    the validator's throttle period, less what the submission takes. Whoever waits meanwhile gets an equal share.
    """

    def __init__(self, most: int | Literal["auto"], capacity: Capacity, workers: int, now: Callable[[], float]) -> None:
        self._most = None if most == "auto" else most
        self._capacity = capacity
        self._workers = workers
        self._now = now
        self._submission_s: dict[str, float] = {}

    def round(self, assignment: Assignment, made: int, tasks: int) -> Round | None:
        """The next one of a task that has `made` candidates; None when another one would cost something.

        `tasks`: how many are worked on or wait for it, this one included.
        """
        left = MAX_CANDIDATES if self._most is None else min(self._most - made, MAX_CANDIDATES)
        one = self._capacity.seconds_without_wait()
        # Of a validator that has not answered a submission yet it is not known what time is free.
        submission = self._submission_s.get(assignment.validator.hotkey)
        if left <= 0 or self._most == 1 or one is None or submission is None:
            return None
        free = assignment.free_until - submission - MARGIN_S - self._now()
        free *= min(1.0, self._workers / max(tasks, 1))
        # Tasks that are worked on together take turns, so that one candidate of each takes so many times as long.
        beside = min(max(tasks, 1), self._workers)
        seconds = min(free, max(ROUND_S, 1.25 * one * beside) + TRANSFER_S)
        count = self._capacity.candidates_within(seconds - TRANSFER_S, beside)
        return Round(min(count, left), seconds) if count > 0 else None

    def free_seconds(self, assignment: Assignment) -> float:
        """How long the validator's next task can be held for more candidates; 0 where it gets no more than one."""
        submission = self._submission_s.get(assignment.validator.hotkey)
        if self._most == 1 or submission is None:
            return 0.0
        free = assignment.free_until - assignment.pulled_at - submission - MARGIN_S
        return free if self._capacity.candidates_within(free - TRANSFER_S, 1) > 1 else 0.0

    def submitted(self, assignment: Assignment) -> None:
        """Its result is on its way: how long that takes is what the next one has to leave time for."""
        began, hotkey = self._now(), assignment.validator.hotkey

        def settled(_: object) -> None:
            seconds = min(self._now() - began, MAX_SUBMISSION_S)
            before = self._submission_s.get(hotkey, seconds)
            self._submission_s[hotkey] = max(seconds, before + SHORTER_SHARE * (seconds - before))

        assignment.settled.add_done_callback(settled)
