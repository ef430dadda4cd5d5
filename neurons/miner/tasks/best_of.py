"""How many candidates a task gets: as many as fit into the time for which holding it is free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from neurons.miner.assignment import Assignment

# Limits of one request to a generation service. A task that comes meanwhile may have to wait for its end.
MAX_CANDIDATES = 64
ROUND_S = 5.0
# Seconds of a request's planned time that are kept for the transfer of the splat.
TRANSFER_S = 0.5
# Validators count in whole seconds.
MARGIN_S = 1.0
MAX_SUBMISSION_S = 60.0
# Weight of a shorter submission in the expected duration of the next one. A longer one replaces it at once.
SHORTER_SHARE = 0.3


@dataclass(frozen=True)
class Round:
    """One request to a generation service: `candidates` of them within `seconds`."""

    candidates: int
    seconds: float

    @property
    def budget(self) -> float:
        """The part of `seconds` that the service gets as its budget."""
        return max(self.seconds - TRANSFER_S, 0.1)


class Capacity(Protocol):
    """Knows how fast the generation services are."""

    def seconds_without_wait(self) -> float | None:
        """Seconds that a task takes on the slowest usable service, without queueing; None before a measurement."""

    def candidates_within(self, seconds: float, tasks: int) -> int:
        """How many candidates each of `tasks` tasks can have within `seconds`; 0 also before the first measurement."""


class BestOf:
    """Plans rounds of candidates.

    A task's cooldown counts from its assignment, so holding the task for the validator's throttle period, less the time
    of the submission, costs nothing. Tasks that are held at the same time share the generators equally.
    """

    def __init__(self, most: int | Literal["auto"], capacity: Capacity, workers: int, now: Callable[[], float]) -> None:
        self._most = None if most == "auto" else most
        self._capacity = capacity
        self._workers = workers
        self._now = now
        self._submission_s: dict[str, float] = {}

    def round(self, assignment: Assignment, made: int, tasks: int) -> Round | None:
        """The next round for a task that has `made` candidates; None if another one would delay something.

        `tasks`: how many tasks are in generation or wait for it, this one included.
        """
        left = MAX_CANDIDATES if self._most is None else min(self._most - made, MAX_CANDIDATES)
        one = self._capacity.seconds_without_wait()
        # Without an answered submission the free time of this validator is not known.
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
        """Seconds for which the validator's next task may be held for more candidates; 0 if it gets only one."""
        submission = self._submission_s.get(assignment.validator.hotkey)
        if self._most == 1 or submission is None:
            return 0.0
        free = assignment.free_until - assignment.pulled_at - submission - MARGIN_S
        return free if self._capacity.candidates_within(free - TRANSFER_S, 1) > 1 else 0.0

    def submitted(self, assignment: Assignment) -> None:
        """Measures the submission that begins now: its duration is reserved in the next task's time."""
        began, hotkey = self._now(), assignment.validator.hotkey

        def settled(_: object) -> None:
            seconds = min(self._now() - began, MAX_SUBMISSION_S)
            before = self._submission_s.get(hotkey, seconds)
            self._submission_s[hotkey] = max(seconds, before + SHORTER_SHARE * (seconds - before))

        assignment.settled.add_done_callback(settled)
