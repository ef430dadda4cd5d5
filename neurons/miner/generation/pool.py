"""Several generation services as one: least outstanding work first, failing ones left out and tried again."""

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
# How long a failing endpoint is left out. Doubled with each failure in a row.
FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 300.0
# A failure may be the task's own. An endpoint is left out after more than this in a row.
TOLERATED_FAILURES = 2
# An endpoint that could not be reached so many times in a row is gone: another one gets its tasks.
GONE_AFTER = 2
# An endpoint that did not answer so many health checks in a row, which takes 30 s, may be frozen. Another one gets its
# tasks as well, and the first answer counts.
FROZEN_AFTER = 3
# Weight of the newest measurement in the moving averages.
NEWEST_SHARE = 0.1
# An endpoint that had nothing to do for so long, and for so many times what a candidate took there, may have become
# faster: it gets the next task, and is measured anew.
STALE_AFTER_S = 300.0
STALE_AFTER_COSTS = 20.0

log = logging.getLogger(__name__)


class ServiceUnavailable(Exception):
    """No endpoint could take the task in time. The task itself is fine."""


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
    `duration`: from the start to the end of a task, its wait in the service included. It follows a shorter one at once
    and a longer one slowly, because the shortest is what a task takes without a wait. Several candidates of a task take
    longer than one, but at most as many times as long: they shorten it by their whole time, and lengthen it by a share.

    What was measured long ago is stale. It stands until the next task is finished, and is forgotten then: an endpoint
    that was slow once gets no tasks, so that no average over tasks would ever show that it is fast again.
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
        """Whether the next task should tell how fast the endpoint is."""
        idle = self._now() - self._changed_at
        return not self.in_work and idle >= max(STALE_AFTER_S, STALE_AFTER_COSTS * (self.cost or 0.0))

    def begin(self) -> float:
        """To be handed to `end`."""
        if self.is_stale:
            self._busy = self._busy_sum = self._finished = 0.0
        self._advance(1)
        return self._changed_at

    def end(self, begun: float, finished: int) -> None:
        """`begun`: what `begin` returned. `finished`: how many candidates it brought, which the averages are of."""
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
    """`ready` is set while at least one endpoint can take a task."""

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
        """From now on a task that no endpoint can take raises ServiceUnavailable at once."""
        self._stopping.set()

    def expected_seconds(self, tasks: int) -> float | None:
        """In how many seconds `tasks` tasks are finished when all are begun now; None while nothing is measured."""
        paces = [endpoint.pace for endpoint in self._usable()]
        durations = [pace.duration for pace in paces if pace.duration is not None]
        if not durations:
            return None
        rate = sum(1 / pace.cost for pace in paces if pace.cost)
        return max(*durations, tasks / rate if rate else 0.0)

    def seconds_without_wait(self) -> float | None:
        """What one task takes on whichever endpoint it comes to, without a wait; None while nothing is measured."""
        return max((each.pace.duration for each in self._usable() if each.pace.duration is not None), default=None)

    def candidates_within(self, seconds: float, tasks: int) -> int:
        """How many candidates each of `tasks` tasks can have within `seconds`, on whichever endpoint it comes to; 0 as
        well while one of them is not measured.
        """
        paces = [endpoint.pace for endpoint in self._usable()]
        if not paces or any(not pace.cost or pace.duration is None or pace.duration > seconds for pace in paces):
            return 0
        beside = math.ceil(max(tasks, 1) / len(paces))
        return int(min(seconds / (pace.cost * beside) for pace in paces if pace.cost))

    async def watch(self) -> None:
        """Keeps up with the endpoints' health, for as long as it runs."""
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
        """The splat of one task, moved on to another endpoint when one fails. Given up after `patience` seconds. The
        best of so many candidates as an endpoint makes within `budget` seconds.

        A frozen endpoint keeps the task while another one is asked for it too: the first answer counts. Raises
        GenerationFailed, AttemptFailed (by every endpoint that could be asked), or ServiceUnavailable.
        """
        give_up_at = self._now() + patience
        ask = partial(_ask, task=task, seed=seed, candidates=candidates, budget=budget)
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
                for attempt in await self._any_news(attempts):
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

    async def _any_news(self, attempts: dict[asyncio.Task[Generated], _Endpoint]) -> list[asyncio.Task[Generated]]:
        """Waits until an attempt ends or an endpoint freezes; with all frozen, until an attempt ends or there is
        another endpoint. Returns the attempts that ended.
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
        """One endpoint's answer; its failures are counted."""
        try:
            generated = await self._generate(endpoint, ask, give_up_at)
        except EndpointUnavailable as error:
            # A service that says for how long it is busy has not failed.
            self._failed(endpoint, begun, error, error.seconds, counts=error.seconds is None)
            raise
        except AttemptFailed as error:
            self._failed(endpoint, begun, error, 0.0 if endpoint.failures < TOLERATED_FAILURES else None)
            raise
        endpoint.failures = 0
        return generated

    async def _generate(self, endpoint: _Endpoint, ask: _Ask, give_up_at: float) -> Generated:
        """Gives up when the endpoint is gone, too, for a machine that vanished never closes the connection."""
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
        """The usable endpoint, none of `failed`, that would be done first with one more task; before all others one of
        which it is not known.
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
        """Leaves the endpoint out for `pause` seconds; None: for twice as long with each failure in a row.

        `counts`: whether this is a failure of that row.
        """
        if begun_at < endpoint.failed_at:
            return  # With an endpoint that goes all its tasks fail, which is one failure.
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
                # A busy service answers late.
                said = "ready" if endpoint.healthy and not endpoint.frozen.is_set() else "not answering"
            if said != endpoint.said:
                level = logging.INFO if said == "ready" else logging.WARNING
                log.log(level, "Generation service at %s: %s", endpoint.service.endpoint, quoted(said))
                endpoint.said = said
            if said == "ready" and not endpoint.healthy:
                # Started again, or over what it had: its failures were those of before.
                endpoint.failures, endpoint.left_out_until = 0, 0.0
            endpoint.healthy = said == "ready"
            self._update_ready()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _update_ready(self) -> None:
        if self._usable():
            self.ready.set()
        else:
            self.ready.clear()


async def _ask(service: Service, task: Task, seed: int, candidates: int, budget: float | None) -> Generated:
    return await service.generate(task, seed, candidates, budget)


def _end(pace: Pace, begun: float, attempt: asyncio.Task[Generated]) -> None:
    result = None if attempt.cancelled() or attempt.exception() is not None else attempt.result()
    # What was rejected before its splat was made says nothing of the time that a splat takes.
    is_made = result is not None and (result.ply or result.score is not None)
    pace.end(begun, finished=result.candidates if result is not None and is_made else 0)


def _set(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()
