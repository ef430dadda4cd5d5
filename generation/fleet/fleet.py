"""Several engines as one: the least busy engine takes a request, and runs it again if another engine was lost."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from generation.engine.engine import (
    LATE,
    LOADING_RETRY_S,
    TIMEOUT_S,
    DeadlineExceeded,
    OnProgress,
    StageFailed,
    Unavailable,
)
from generation.fleet.process import ProcessEngine
from generation.fleet.remote import EngineLost, NotSent, RemoteEngine
from generation.schema.results import Asset, Request

LOADER = "generation.pipeline.trace:load"
#: A request that was running on so many engines when they were lost is taken for the cause, and fails.
MAX_RUNS = 3

log = logging.getLogger("generation.fleet")

T = TypeVar("T")
#: Makes an engine from a device's name, its settings, the loader, and a callback for joining or leaving the rotation.
Form = Callable[[str, Any, str, Callable[[], None]], RemoteEngine]


class _Place:
    """A request's place on an engine, once it is given. ``isolated``: the engine runs nothing else meanwhile."""

    def __init__(self, is_call: bool, background: bool, isolated: bool) -> None:
        self.is_call = is_call
        self.background = background
        self.isolated = isolated
        self.engine: RemoteEngine | None = None
        self.given: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Fleet:
    """Has the methods of an ``Engine``, and spreads requests over several engines.

    ``devices`` maps each device's name (see ``ProcessEngine``) to its ``generation.settings.Settings``. ``form`` makes
    its engine from these and from ``loader`` ("module:function"). The first device's ``max_queue`` limits how many
    requests may wait. All public methods but ``stop`` are for the asyncio thread.
    """

    #: The engines' settings, where they are known only after a start (on a cluster); otherwise None.
    resolved: Any = None

    def __init__(self, devices: Mapping[str, Any], loader: str = LOADER, form: Form = ProcessEngine) -> None:
        self.totals = dict.fromkeys(("requests", "delivered", "rejected", "failed", "cancelled", "refused"), 0)
        self._engines = [form(device, settings, loader, self._hand_out) for device, settings in devices.items()]
        self._max_queue = next((settings.max_queue for settings in devices.values()), 0)
        self._waiting: deque[_Place] = deque()
        self._calls: Counter[bool] = Counter()  # waiting and in flight, by whether they are in the background
        self._mean_seconds = 30.0  # of a generation; follows what is measured
        self._stopping = False
        self._supervision: dict[RemoteEngine, asyncio.Task[None]] = {}

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._supervision = {each: self._loop.create_task(each.supervise()) for each in self._engines}

    def stop(self, timeout: float) -> None:
        """Fail all requests, and wait at most ``timeout`` seconds for the processes. Not on the asyncio thread."""
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(timeout)

    async def _stop(self) -> None:
        self._stopping = True
        self._turn_away()
        for task in self._supervision.values():
            task.cancel()
        await asyncio.gather(*self._supervision.values(), return_exceptions=True)

    def _add(self, engine: RemoteEngine) -> None:
        self._engines.append(engine)
        self._supervision[engine] = self._loop.create_task(engine.supervise())

    def _remove(self, engine: RemoteEngine, reason: str) -> None:
        """Take an engine out for good. Its requests run on others."""
        self._engines.remove(engine)
        engine.end(reason)
        task = self._supervision[engine]
        task.cancel()
        task.add_done_callback(lambda _: self._supervision.pop(engine))

    @property
    def status(self) -> str:
        """ "ready" if any engine is, else "loading" if any engine is, else "failed"."""
        states = ["failed"] if self._stopping else [each.status for each in self._engines]
        return next((status for status in ("ready", "loading", "failed") if status in states), "loading")

    @property
    def reason(self) -> str:
        if self._stopping:
            return "shutting down"
        others = [f"{each.device}: {each.reason}" for each in self._engines if each.status != "ready"]
        ready = len(self._engines) - len(others)
        return "; ".join([f"{ready} of {len(self._engines)} engines ready", *others])

    @property
    def models(self) -> list[dict[str, Any]]:
        """The models of one engine, since all have the same. Empty until one is ready."""
        return next((each.models for each in self._engines if each.models), [])

    @property
    def queue_depth(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting) + sum(each["queue_depth"] for each in self.health())

    @property
    def active(self) -> list[dict[str, Any]]:
        """The running requests, as ``Engine.active``."""
        return [request for each in self.health() for request in each["active"]]

    def health(self) -> list[dict[str, Any]]:
        """An entry for each engine, as in ``Engine.health``."""
        return [each.health() for each in self._engines]

    def spare(self, background: bool = False) -> int:
        """As ``Engine.spare``, summed over all engines."""
        if self._waiting:
            return 0
        engines = [each for each in self._engines if each.in_rotation and each.has_room(background)]
        free = sum(each.capacity - (each.generations if background else each.interactive) for each in engines)
        return max(0, free - any(each.capacity > 1 for each in engines))

    def check_admission(self, background: bool = False) -> None:
        """Raises Unavailable when ``generate`` would: with no engine ready, with the queue full."""
        self._check_room(sum(not place.is_call and place.background == background for place in self._waiting))

    def _check_room(self, waiting: int) -> None:
        if self.status == "loading":
            raise Unavailable(f"models are loading: {self.reason}", LOADING_RETRY_S)
        if self.status != "ready":
            raise self._no_engine()
        if waiting >= self._max_queue:
            self.totals["refused"] += 1
            places = sum(each.capacity for each in self._engines if each.status == "ready")
            next_place = math.ceil(self._mean_seconds / places)
            raise Unavailable(f"queue full: {self._max_queue} requests wait already", max(1, next_place))

    def _no_engine(self) -> Unavailable:
        if self._stopping:
            return Unavailable("the service is shutting down", None)
        pause = min((each.next_start for each in self._engines), default=math.inf) - time.monotonic()
        return Unavailable(
            f"no engine works: {self.reason}", LOADING_RETRY_S if pause == math.inf else max(1, math.ceil(pause))
        )

    async def generate(self, request: Request, on_progress: OnProgress | None = None) -> Asset:
        """As ``Engine.generate``."""

        async def generate(remote: RemoteEngine) -> Asset:
            asset = await remote.generate(request, on_progress)
            self._mean_seconds += (asset.report.total_seconds - self._mean_seconds) / 4
            return asset

        self.check_admission(request.background)
        self.totals["requests"] += 1
        try:
            asset = await self._run(False, request.background, generate)
        except asyncio.CancelledError:
            self.totals["cancelled"] += 1
            raise
        except Exception:
            self.totals["failed"] += 1
            raise
        self.totals["delivered" if asset.report.rejected is None else "rejected"] += 1
        return asset

    async def call(self, function: Callable[[Any], T], background: bool = False) -> T:
        """As ``Engine.call``, for a picklable function with a picklable result."""
        self._check_room(self._calls[background])
        self._calls[background] += 1
        try:
            return await self._run(True, background, lambda remote: remote.call(function, background))
        finally:
            self._calls[background] -= 1

    async def _run(self, is_call: bool, background: bool, work: Callable[[RemoteEngine], Awaitable[T]]) -> T:
        """Run ``work`` on the least busy engine, and again on another one if that engine is lost.

        Further runs are isolated: any of the requests on a lost engine may have been the cause, and it must not take
        the others with it again. Raises StageFailed after MAX_RUNS lost engines, DeadlineExceeded, and Unavailable when
        there is no engine to wait for.
        """
        lost: list[str] = []
        had_a_turn = False
        try:
            async with asyncio.timeout(None if background else TIMEOUT_S):
                while len(lost) < MAX_RUNS:
                    isolated = bool(lost) and not is_call
                    async with self._place(is_call, background, isolated, first=had_a_turn) as remote:
                        had_a_turn = True
                        try:
                            return await work(remote)
                        except NotSent:
                            pass
                        except EngineLost as error:
                            lost.append(f"{remote.device}: {error}")
        except TimeoutError:
            log.error("Generation failed: %s", LATE)
            raise DeadlineExceeded(LATE) from None
        log.error("Generation failed: every engine that it ran on was lost: %s", "; ".join(lost))
        raise StageFailed(f"every engine that it ran on was lost: {'; '.join(lost)}")

    @asynccontextmanager
    async def _place(self, is_call: bool, background: bool, isolated: bool, first: bool) -> AsyncIterator[RemoteEngine]:
        """Wait for a place on the engine with the least work, at the queue's end or, with ``first``, at its head."""
        if self._stopping:
            raise self._no_engine()
        place = _Place(is_call, background, isolated)
        if first:
            self._waiting.appendleft(place)
        else:
            self._waiting.append(place)
        self._hand_out()
        try:
            await place.given
            assert place.engine is not None
            yield place.engine
        finally:
            if place in self._waiting:
                self._waiting.remove(place)
            if place.engine is not None:
                _count(place, -1)
                self._hand_out()

    def _hand_out(self) -> None:
        """Give free places to waiting requests, in their order, background requests last.

        An isolated request that finds no idle engine reserves one; other requests use the rest. If there is no engine
        to wait for, all waiting requests fail.
        """
        in_rotation = [each for each in self._engines if each.in_rotation]
        reserved: list[RemoteEngine] = []
        for place in sorted(self._waiting, key=lambda place: place.background):
            if place.given.done():
                continue
            open_ones = in_rotation if place.is_call else [each for each in in_rotation if each not in reserved]
            engines = [each for each in open_ones if place.is_call or each.has_room(place.background, place.isolated)]
            if engines:
                self._waiting.remove(place)
                # An interactive request goes to the engine with the fewest other interactive ones.
                place.engine = min(engines, key=lambda each: (not place.is_call and each.interactive, each.load))
                place.given.set_result(None)
                _count(place, 1)
            elif place.isolated and open_ones:
                # The engine that will be free first takes nothing more, or it would never be free.
                reserved.append(min(open_ones, key=lambda each: each.generations))
        if not self._can_wait():
            self._turn_away()

    def _can_wait(self) -> bool:
        """Whether there is an engine left to wait for."""
        return any(each.hopeful for each in self._engines)

    def _turn_away(self) -> None:
        for place in self._waiting:
            if not place.given.done():
                place.given.set_exception(self._no_engine())
        self._waiting.clear()


def _count(place: _Place, change: int) -> None:
    assert place.engine is not None
    if place.is_call:
        place.engine.calls += change
    else:
        place.engine.generations += change
        place.engine.interactive += change * (not place.background)
        if place.isolated:
            place.engine.isolates = None if change < 0 else "background" if place.background else "interactive"
