"""Several candidates of one request, which differ in their seeds: the best by the final score is the outcome."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from generation.engine.engine import TIMEOUT_S, OnProgress, Unavailable
from generation.schema.results import Asset, Report, Request
from generation.schema.score import final_score

#: Seconds between two checks whether there is room for another candidate.
LOOK_S = 0.1
#: After so many failed candidates a request begins no further ones.
MOST_FAILURES = 2
#: The stage in progress events once the first candidate is done. Its progress is the share of candidates done.
STAGE = "candidates"
_SEED_STEP = 0x9E3779B1  # odd, so that all seeds of a request differ


class Maker(Protocol):
    """What is needed of an ``Engine`` or a ``Fleet``."""

    def spare(self, background: bool) -> int:
        """How many more requests of this priority would take nobody's place."""

    async def generate(self, request: Request, on_progress: OnProgress | None = None) -> Asset:
        """One candidate."""


def seed_of(seed: int, number: int) -> int:
    """The seed of a request's candidate; that of number 0 is the request's own."""
    return (seed + number * _SEED_STEP) % 2**32


@dataclass(eq=False)
class _Group:
    """A request and its candidates, by number."""

    request: Request
    until: float  # by the loop's clock, as all times here
    on_progress: OnProgress | None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    begun: int = 0
    running: set[asyncio.Task[None]] = field(default_factory=set)
    scores: dict[int, float | None] = field(default_factory=dict)
    best: Asset | None = None
    failures: list[Exception] = field(default_factory=list)
    shortest_s: float = 0.0  # seconds that a candidate took
    is_closed: bool = False  # no more are begun

    def wants_more(self, now: float) -> bool:
        """Whether another candidate would be worth it."""
        wanted = self.begun < self.request.candidates and len(self.failures) < MOST_FAILURES
        return wanted and not self.is_closed and now + self.shortest_s < self.until

    def take(self, number: int, asset: Asset) -> None:
        """Only the best splat is kept: each takes some 100 MB."""
        self.scores[number] = asset.report.score
        if self.best is None or merit(asset.report) > merit(self.best.report):
            self.best = asset
        self.is_closed |= asset.report.hopeless


def merit(report: Report) -> float:
    """What candidates are compared by: the final score, without its limit of 1; -1 where it was not measured.

    A rejected one has none, or one under the threshold, so every splat that passed is above it.
    """
    if report.score is None:
        return -1.0
    return max(report.score, final_score(report.parts)) if report.score >= 1.0 and report.parts else report.score


class Candidates:
    """Where requests go to an engine or a fleet, of one candidate or of several. For the asyncio thread.

    A first candidate is a request like all others. The further ones are begun where they take nobody's place: while
    none waits, and one place is left for the next that comes; requests share what there is.
    """

    def __init__(self, engine: Maker) -> None:
        self._engine = engine
        self._groups: list[_Group] = []
        self._entering: set[asyncio.Task[None]] = set()  # begun, but not known to the engine yet

    async def generate(self, request: Request, on_progress: OnProgress | None = None) -> Asset:
        """The best of the request's candidates, with all scores in its report; of one, as ``Engine.generate``.

        Ends when all are done, or at the end of the budget once there is any. Cancelling the awaiting task cancels
        them all. Raises as ``Engine.generate`` does when not one came to a result.
        """
        if request.candidates == 1:
            return await self._engine.generate(request, on_progress)
        now = asyncio.get_running_loop().time
        budget = TIMEOUT_S if request.budget_seconds is None else request.budget_seconds
        group = _Group(request, now() + budget, on_progress)
        self._groups.append(group)
        try:
            self._begin(group)
            while (more := group.wants_more(now())) or group.running:
                left = group.until - now()
                if group.best is not None and left <= 0:
                    break
                self._hand_out()
                group.changed.clear()
                patience = None if group.best is None else left
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(LOOK_S, left) if more else patience):
                        await group.changed.wait()
        finally:
            group.is_closed = True
            self._groups.remove(group)
            running = list(group.running)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if group.best is None:
            raise group.failures[0]
        scores = {0: None, **group.scores}
        group.best.report.candidates = [(seed_of(request.seed, number), scores[number]) for number in sorted(scores)]
        return group.best

    def _hand_out(self) -> None:
        """Begin what there is room for: of persons first, then of whoever has the fewest running."""
        now = asyncio.get_running_loop().time()
        while wanting := [group for group in self._groups if group.wants_more(now)]:
            group = min(wanting, key=lambda each: (each.request.background, len(each.running)))
            if self._engine.spare(group.request.background) <= len(self._entering):
                return
            self._begin(group)

    def _begin(self, group: _Group) -> None:
        number = group.begun
        group.begun += 1
        request = replace(group.request, seed=seed_of(group.request.seed, number), candidates=1, budget_seconds=None)
        now = asyncio.get_running_loop().time
        tell = group.on_progress

        def first(stage: str, fraction: float, *preview: bytes) -> None:
            if tell is not None and not group.scores:
                tell(stage, fraction, *preview)

        async def make() -> None:
            self._entering.discard(task)
            began = now()
            try:
                asset = await self._engine.generate(request, None if tell is None or number else first)
            except Exception as error:
                group.failures.append(error)
                group.is_closed |= isinstance(error, Unavailable)
            else:
                took = now() - began
                group.shortest_s = min(group.shortest_s or took, took)
                group.take(number, asset)
            finally:
                group.running.discard(task)
                group.changed.set()
            if tell is not None and group.scores:
                tell(STAGE, (group.begun - len(group.running)) / group.request.candidates)

        task = asyncio.create_task(make())
        self._entering.add(task)
        group.running.add(task)
