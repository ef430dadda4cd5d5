"""Several generation services as one: least outstanding work first; failing ones are left out for a while."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

from common.log_lines import quoted
from neurons.miner.assignment import USEFUL_AGE_S
from neurons.miner.generation.service import AttemptFailed, EndpointUnavailable, Generated
from neurons.miner.validators.clock import steady_time
from neurons.protocol import Task

HEALTH_INTERVAL_S = 5.0
# Seconds for which a failing endpoint is left out. Doubled with each failure in a row.
FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 300.0
# A failure may be the task's fault, so an endpoint is left out only after more than this many in a row.
TOLERATED_FAILURES = 2
# An endpoint that could not be reached this many times in a row is gone: another one gets its tasks.
GONE_AFTER = 2
# An endpoint that did not answer this many health checks in a row, which takes 30 s, may be frozen. Its tasks are also
# given to another one, and the first answer counts.
FROZEN_AFTER = 3
# Weight of the newest measurement in the moving averages.
NEWEST_SHARE = 0.1
# An endpoint that was idle for this many seconds, and for this many times what a candidate took there, may have become
# faster: it gets the next task, and is measured anew.
STALE_AFTER_S = 300.0
STALE_AFTER_COSTS = 20.0

log = logging.getLogger(__name__)


class ServiceUnavailable(Exception):
    """No endpoint could take the task in time. It is not the task's fault."""


class Service(Protocol):
    """What the pool needs of a GenerationService."""

    endpoint: str

    async def health(self) -> str | None:
        """See GenerationService. Raises EndpointUnavailable."""

    async def generate(self, task: Task, seed: int, candidates: int = 1, budget: float | None = None) -> Generated:
        """See GenerationService. Raises GenerationFailed, AttemptFailed or EndpointUnavailable."""


_Ask = Callable[[Service], Coroutine[Any, Any, Generated]]


class Pace:
    """How fast an endpoint works, as moving averages over its finished tasks. In seconds.

    `cost`: time in which it had any work, per finished candidate, whether it works on one at a time or on many.
    `duration`: from the start to the end of a task, its wait in the service included. It follows a shorter task at once
    and a longer one slowly, because the shortest is what a task takes without a wait. N candidates take between 1 and N
    times as long as one, so their whole time can shorten it, and an N-th of their time can lengthen it.

    Old measurements are stale: they are replaced when the next task is finished. An endpoint that was slow once gets no
    tasks, so an average over tasks would never show that it is fast again.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._changed_at = 0.0
        self._busy = 0.0  # since the last finished task
        self._busy_sum = 0.0
        self._finished = 0.0
        self.in_work = 0
        self.cost: float | None = None
        self.duration: float | None = None

    @property
    def is_stale(self) -> bool:
        """Whether the endpoint should get the next task, to be measured anew."""
        idle = self._now() - self._changed_at
        return not self.in_work and idle >= max(STALE_AFTER_S, STALE_AFTER_COSTS * (self.cost or 0.0))

    def begin(self) -> float:
        """Starts a task. Returns the time, to be passed to `end`."""
        if self.is_stale:
            self._busy = self._busy_sum = self._finished = 0.0
        self._advance(1)
        return self._changed_at

    def end(self, begun: float, finished: int) -> None:
        """Ends a task. `begun`: from `begin`. `finished`: how many candidates it brought, over which is averaged."""
        self._advance(-1)
        if finished:
            self._busy_sum = (1 - NEWEST_SHARE) * self._busy_sum + self._busy
            self._finished = (1 - NEWEST_SHARE) * self._finished + finished
            self._busy = 0.0
            self.cost = self._busy_sum / self._finished
            duration = self._changed_at - begun
            before = duration if self.duration is None else self.duration
            self.duration = min(duration, before + NEWEST_SHARE * max(duration / finished - before, 0.0))

    def _advance(self, change: int) -> None:
        now = self._now()
        if self.in_work:
            self._busy += now - self._changed_at
        self._changed_at = now
        self.in_work += change


class _Endpoint:
    def __init__(self, service: Service, now: Callable[[], float]) -> None:
        self.service = service
        self.pace = Pace(now)
        self.healthy = False
        self.said = ""
        self.failures = 0  # in a row
        self.unreachable = 0  # health checks in a row that found no connection
        self.unanswered = 0  # health checks in a row without an answer, for whatever reason
        self.gone = asyncio.Event()
        self.frozen = asyncio.Event()
        self.failed_at = 0.0
        self.left_out_until = 0.0


class GeneratorPool:
    """Distributes tasks over endpoints. `ready` is set while at least one can take a task."""

    def __init__(self, services: Sequence[Service], now: Callable[[], float] = steady_time) -> None:
        self._endpoints = [_Endpoint(service, now) for service in services]
        self._now = now
        self._stopping = asyncio.Event()
        self.ready = asyncio.Event()

    @property
    def usable(self) -> dict[str, bool]:
        """Endpoint -> whether it can take a task now."""
        usable = self._usable()
        return {endpoint.service.endpoint: endpoint in usable for endpoint in self._endpoints}

    def stop_waiting(self) -> None:
        """From now on `generate` raises ServiceUnavailable at once if no endpoint can take a task."""
        self._stopping.set()

    def expected_seconds(self, tasks: int) -> float | None:
        """Seconds until `tasks` tasks that begin now would be finished; None before the first measurement."""
        paces = [endpoint.pace for endpoint in self._usable()]
        durations = [pace.duration for pace in paces if pace.duration is not None]
        if not durations:
            return None
        rate = sum(1 / pace.cost for pace in paces if pace.cost)
        return max(*durations, tasks / rate if rate else 0.0)

    def seconds_without_wait(self) -> float | None:
        """Seconds that a task takes on the slowest usable endpoint, without queueing; None before a measurement."""
        return max((each.pace.duration for each in self._usable() if each.pace.duration is not None), default=None)

    def candidates_within(self, seconds: float, tasks: int) -> int:
        """How many candidates each of `tasks` tasks can have within `seconds`, even on the slowest usable endpoint; 0
        also while one of them is not measured.
        """
        paces = [endpoint.pace for endpoint in self._usable()]
        if not paces or any(not pace.cost or pace.duration is None or pace.duration > seconds for pace in paces):
            return 0
        beside = math.ceil(max(tasks, 1) / len(paces))
        return int(min(seconds / (pace.cost * beside) for pace in paces if pace.cost))

    async def watch(self) -> None:
        """Follows the endpoints' health until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for endpoint in self._endpoints:
                group.create_task(self._watch(endpoint))

    async def generate(
        self,
        task: Task,
        seed: int,
        patience: float = USEFUL_AGE_S,
        candidates: int = 1,
        budget: float | None = None,
    ) -> Generated:
        """The splat of one task: the best of at most `candidates` that an endpoint makes within `budget` seconds.

        When an endpoint fails, another one is asked. When one is frozen, another one is asked as well, and the first
        answer counts. Raises GenerationFailed, AttemptFailed (at every endpoint that could be asked), or
        ServiceUnavailable, and gives up after `patience` seconds.
        """

        async def ask(service: Service) -> Generated:
            return await service.generate(task, seed, candidates, budget)

        give_up_at = self._now() + patience
        attempts: dict[asyncio.Task[Generated], _Endpoint] = {}
        failed: list[_Endpoint] = []
        failure: AttemptFailed | None = None
        try:
            while True:
                if all(endpoint.frozen.is_set() for endpoint in attempts.values()):
                    asked = [*failed, *attempts.values()]
                    endpoint = self._least_busy(asked) if self._now() < give_up_at else None
                    if endpoint is not None:
                        begun = endpoint.pace.begin()
                        attempt = asyncio.create_task(self._attempt(endpoint, ask, begun, give_up_at))
                        attempt.add_done_callback(partial(_end, endpoint.pace, begun))
                        attempts[attempt] = endpoint
                    elif failure is not None:
                        raise failure
                    elif not attempts:
                        await self._until_ready(give_up_at)
                        continue
                for attempt in await self._next_change(attempts):
                    endpoint = attempts.pop(attempt)
                    try:
                        return attempt.result()
                    except EndpointUnavailable:
                        pass
                    except AttemptFailed as error:
                        failed.append(endpoint)
                        failure = error
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)

    async def _next_change(self, attempts: dict[asyncio.Task[Generated], _Endpoint]) -> list[asyncio.Task[Generated]]:
        """Waits until an attempt ends or an endpoint freezes; if all are frozen, until an attempt ends or another
        endpoint is usable. Returns the attempts that ended.
        """
        working = [endpoint for endpoint in attempts.values() if not endpoint.frozen.is_set()]
        events = [endpoint.frozen for endpoint in working] or [self.ready]
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait((*attempts, *waits), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return [attempt for attempt in attempts if attempt.done()]

    async def _attempt(self, endpoint: _Endpoint, ask: _Ask, begun: float, give_up_at: float) -> Generated:
        """One endpoint's answer. Counts its failures."""
        try:
            generated = await self._generate(endpoint, ask, give_up_at)
        except EndpointUnavailable as error:
            # A service that is busy, and says for how long, has not failed.
            self._failed(endpoint, begun, error, error.seconds, counts=error.seconds is None)
            raise
        except AttemptFailed as error:
            self._failed(endpoint, begun, error, 0.0 if endpoint.failures < TOLERATED_FAILURES else None)
            raise
        endpoint.failures = 0
        return generated

    async def _generate(self, endpoint: _Endpoint, ask: _Ask, give_up_at: float) -> Generated:
        """As the service's `generate`, but ends when the endpoint is gone: a lost machine closes no connection."""
        asked_at = self._now()
        working = asyncio.ensure_future(ask(endpoint.service))
        gone = asyncio.ensure_future(endpoint.gone.wait())
        try:
            await asyncio.wait((working, gone), timeout=give_up_at - asked_at, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if gone.done():
                raise EndpointUnavailable("gone while it had a task")
            seconds = self._now() - asked_at
            raise AttemptFailed(f"no answer in {seconds:.0f} s", endpoint.service.endpoint, seconds)
        finally:
            working.cancel()
            gone.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    def _least_busy(self, failed: list[_Endpoint]) -> _Endpoint | None:
        """The usable endpoint, not in `failed`, that would be the first to finish one more task. One that is not
        measured comes before all others.
        """
        usable = [endpoint for endpoint in self._usable() if endpoint not in failed]
        costs = [endpoint.pace.cost for endpoint in usable if endpoint.pace.cost is not None]
        typical = sum(costs) / len(costs) if costs else 1.0

        def order(endpoint: _Endpoint) -> tuple[bool, float]:
            pace = endpoint.pace
            return not pace.is_stale, (pace.in_work + 1) * (pace.cost or typical)

        return min(usable, key=order, default=None)

    def _usable(self) -> list[_Endpoint]:
        now = self._now()
        return [each for each in self._endpoints if each.healthy and each.left_out_until <= now]

    async def _until_ready(self, give_up_at: float) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (self.ready, self._stopping)]
        try:
            patience = max(give_up_at - self._now(), 0.0)
            await asyncio.wait(waits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if not self.ready.is_set() or self._now() >= give_up_at:
            raise ServiceUnavailable("no generation service can take the task")

    def _failed(
        self, endpoint: _Endpoint, begun_at: float, error: Exception, pause: float | None, counts: bool = True
    ) -> None:
        """Leaves the endpoint out for `pause` seconds; None: twice as long with each failure in a row.

        `counts`: whether this counts as such a failure.
        """
        if begun_at < endpoint.failed_at:
            return  # When an endpoint goes, all its tasks fail: that counts once.
        endpoint.failed_at = self._now()
        if pause is None:
            pause = min(FIRST_PAUSE_S * 2 ** min(endpoint.failures, 10), MAX_PAUSE_S)
        endpoint.failures += counts
        log.warning("Generation service at %s: %s; left out for %.0f s", endpoint.service.endpoint, error, pause)
        endpoint.left_out_until = self._now() + pause
        self._update_ready()
        asyncio.get_running_loop().call_later(pause + 0.01, self._update_ready)

    async def _watch(self, endpoint: _Endpoint) -> None:
        while True:
            try:
                said = await endpoint.service.health()
                endpoint.unreachable = 0
                endpoint.unanswered = endpoint.unanswered + 1 if said is None else 0
            except EndpointUnavailable as error:
                said = str(error)
                endpoint.unreachable += 1
                endpoint.unanswered += 1
            _set(endpoint.gone, endpoint.unreachable >= GONE_AFTER)
            _set(endpoint.frozen, endpoint.unanswered >= FROZEN_AFTER)
            if said is None:
                # A busy service may answer late.
                said = "ready" if endpoint.healthy and not endpoint.frozen.is_set() else "not answering"
            if said != endpoint.said:
                level = logging.INFO if said == "ready" else logging.WARNING
                log.log(level, "Generation service at %s: %s", endpoint.service.endpoint, quoted(said))
                endpoint.said = said
            if said == "ready" and not endpoint.healthy:
                # It was restarted or has recovered: forget its earlier failures.
                endpoint.failures, endpoint.left_out_until = 0, 0.0
            endpoint.healthy = said == "ready"
            self._update_ready()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _update_ready(self) -> None:
        _set(self.ready, bool(self._usable()))


def _end(pace: Pace, begun: float, attempt: asyncio.Task[Generated]) -> None:
    result = None if attempt.cancelled() or attempt.exception() is not None else attempt.result()
    # A task rejected before a splat was made tells nothing of the time that a splat takes.
    is_made = result is not None and (result.ply or result.score is not None)
    pace.end(begun, finished=result.candidates if result is not None and is_made else 0)


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()
