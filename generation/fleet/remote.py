"""The service's proxy of an engine in another process: its requests, supervision and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Literal, Protocol

from generation.engine.engine import LATE, DeadlineExceeded, OnProgress, StageFailed
from generation.fleet.messages import (
    Broken,
    Call,
    Cancel,
    Failure,
    Generate,
    Log,
    Outcome,
    Progress,
    State,
)
from generation.schema.results import Asset, Request

#: Seconds before a lost engine is restarted: doubled after each start that answered no request.
FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 300.0
#: Seconds between checks of an engine's process.
CHECK_S = 2.0
#: An engine whose step takes longer than this hangs with its GPU.
STUCK_S = 120.0
#: A start that takes longer than this hangs, too. The longest one known compiles for six minutes.
LOADING_S = 1800.0
#: Seconds that an idle process has to end after its link was closed.
ENDING_S = 2.0

log = logging.getLogger("generation.fleet.remote")


class EngineLost(Exception):
    """The engine's process ended or became unreliable before it answered."""


class NotSent(Exception):
    """The engine left the rotation before the request was sent, so the request cannot be the cause."""


class NotStarted(Exception):
    """The engine's process can not be started."""


class Link(Protocol):
    """Carries messages to an engine's process and back, in order."""

    def start(self, on_message: Callable[[Any], object], on_end: Callable[[], object]) -> None:
        """Both callbacks may come from any thread; ``on_end`` comes once, after the last message."""

    def send(self, message: Any) -> None:
        """Returns at once. Raises what pickle does when the message can not be pickled."""

    def close(self) -> None:
        """Close both directions."""


class RemoteEngine(ABC):
    """An engine in another process. Subclasses know how to start, check and end that process.

    ``machine`` is where it runs; None for this machine. ``changed`` is called when it joins or leaves the rotation. All
    methods are for the asyncio thread.
    """

    #: An engine in rotation that is silent for so many checks in a row hangs, and is ended.
    silent_checks: ClassVar[int]

    def __init__(self, device: str, machine: str | None, capacity: int, changed: Callable[[], None]) -> None:
        self.device = device
        self.machine = machine
        self.memory_class: str | None = None
        self.models: list[dict[str, Any]] = []
        self.generations = self.calls = 0  # in flight; the fleet changes these
        self.interactive = 0  # of the generations
        #: The priority of the isolated request that runs here, if any: none of that priority is put beside it.
        self.isolates: Literal["interactive", "background"] | None = None
        #: Whether it works or may still start: False in the pause after a failed start.
        self.hopeful = True
        self.next_start = 0.0  # on time.monotonic(), while it is "failed"
        self.capacity = capacity
        self._changed = changed
        self._health: dict[str, Any] = {}  # as the engine's entry, but for the device
        self._set("loading", "starting")
        self._was_ready = self._answered = False  # since the worker's start
        self._lost = 0  # requests, with this worker
        self._link: Link | None = None
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[asyncio.Future[Any], OnProgress | None]] = {}
        self._heard = False
        self._ended = False  # the link is closed: nothing that is sent arrives any more
        self._broken = ""  # why it left the rotation, if it did

    @property
    def status(self) -> str:
        """As an ``Engine``'s: "loading", "ready" (in rotation) or "failed" (until it is started again)."""
        return str(self._health["status"])

    @property
    def reason(self) -> str:
        return str(self._health["reason"])

    @property
    def load(self) -> float:
        """Requests in flight, as a share of the engine's capacity; over 1 if some wait there."""
        return (self.generations + self.calls) / self.capacity

    @property
    def in_rotation(self) -> bool:
        """Whether it takes requests: it is ready, and its process is not known to have ended."""
        return self.status == "ready" and not self._ended

    def has_room(self, background: bool, isolated: bool = False) -> bool:
        """Whether one more generation fits; ``isolated``: one that needs the engine for itself.

        A background request is not put beside an interactive one, where it would only be paused. No request joins an
        isolated one, with one exception: an interactive request may join an isolated background request, which is
        paused meanwhile and so can do no harm.
        """
        if isolated:
            return not self.generations
        if background:
            return self.generations < self.capacity and not self.interactive and self.isolates is None
        return self.interactive < self.capacity and self.isolates != "interactive"

    def health(self) -> dict[str, Any]:
        own = {"device": self.device, "machine": self.machine, "memory_class": self.memory_class}
        return {**self._health, **own}

    async def generate(self, request: Request, on_progress: OnProgress | None = None) -> Asset:
        """As ``Engine.generate``. Also raises EngineLost if the process ends first, and NotSent if it had already."""
        message = Generate(next(self._numbers), request, on_progress is not None)
        asset: Asset = await self._ask(message, on_progress)
        asset.report.device = self.device
        return asset

    async def call(self, function: Callable[[Any], Any], background: bool = False) -> Any:
        """As ``Engine.call``, for a picklable function with a picklable result. Raises EngineLost and NotSent too."""
        return await self._ask(Call(next(self._numbers), function, background))

    async def _ask(self, message: Generate | Call, on_progress: OnProgress | None = None) -> Any:
        if not self.in_rotation:
            raise NotSent(self.reason)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        assert self._link is not None
        self._link.send(message)
        self._asked[message.number] = (future, on_progress)
        try:
            return await future
        except asyncio.CancelledError:
            self._link.send(Cancel(message.number))
            raise
        finally:
            del self._asked[message.number]

    async def supervise(self) -> None:
        """Start the worker, and restart it whenever it ends. Cancelling this ends the worker."""
        pause = FIRST_PAUSE_S
        while True:
            self._set("loading", "starting")
            self.hopeful, self._was_ready, self._answered, self._lost = True, False, False, 0
            reason = "the service is shutting down"
            try:
                reason = await self._run_worker()
            finally:
                self._lose(reason)
            self.hopeful = self._was_ready
            if self._answered:
                pause = FIRST_PAUSE_S
            self.next_start = time.monotonic() + pause
            self._set("failed", f"{reason}; to be started again")
            log.error(
                "Engine on %s is out of rotation: %s. Its %d requests run again; it is started again in %.0f s",
                self.device, reason, self._lost, pause,
            )  # fmt: skip
            self._changed()
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_S)

    def _lose(self, reason: str) -> None:
        """Fail the unanswered requests with EngineLost."""
        waiting = [future for future, _ in self._asked.values() if not future.done()]
        for future in waiting:
            future.set_exception(EngineLost(reason))
        self._lost += len(waiting)

    async def _run_worker(self) -> str:
        """Run a worker from its start to its end. Returns why it ended, in words."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self._broken, self._ended = "", False
        try:
            link = self._link = self._launch()
        except NotStarted as error:
            return f"its process can not be started: {error}"
        link.start(
            lambda message: loop.call_soon_threadsafe(self._take, message),
            lambda: loop.call_soon_threadsafe(self._end_of_link, ended),
        )
        try:
            await self._watch(ended)
        finally:
            await _uninterrupted(self._end(link, ended))
        return self._broken or self._cause()

    @abstractmethod
    def _launch(self) -> Link:
        """Start a process for the engine, without waiting until it is ready. Raises NotStarted."""

    @abstractmethod
    def _has_ended(self) -> bool:
        """Whether the process has ended although the link is still open."""

    @abstractmethod
    async def _finish(self) -> None:
        """Wait until the process has ended, and kill it if need be: only then is its GPU's memory free."""

    @abstractmethod
    def _cause(self) -> str:
        """Why the process has ended."""

    def _end_of_link(self, ended: asyncio.Event) -> None:
        self._ended = True
        ended.set()

    async def _end(self, link: Link, ended: asyncio.Event) -> None:
        link.close()
        await ended.wait()
        await self._finish()

    async def _watch(self, ended: asyncio.Event) -> None:
        """Return when the worker ends, is silent for too long, or does not become ready."""
        silent, started = 0, time.monotonic()
        while not ended.is_set() and not self._has_ended() and silent < self.silent_checks:
            self._heard = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await ended.wait()
            silent = silent + 1 if self.status == "ready" and not self._heard else 0
            if self.status == "loading" and time.monotonic() - started > LOADING_S:
                self.end(f"it was not ready after {LOADING_S:g} s, at: {self.reason}")
        if silent == self.silent_checks:
            self.end(f"its process said nothing for {silent * CHECK_S:.0f} s")

    def _take(self, message: Any) -> None:
        if self._broken:
            return  # sent before it left the rotation
        self._heard = True
        if isinstance(message, State):
            joins = self.status != "ready" and message.health["status"] == "ready"
            self._health, self.models = message.health, message.models
            self.capacity = message.health["at_once"]
            if (message.health["step_seconds"] or 0.0) > STUCK_S:
                self.end(f"a step has taken over {STUCK_S:g} s")
                return
            if joins:
                self._was_ready = True
                self._changed()
        elif isinstance(message, Log):
            name = message.record["name"]
            record = logging.makeLogRecord({**message.record, "name": f"{name}[{self.device}]"})
            logging.getLogger(name).handle(record)
        elif isinstance(message, Broken):
            self.end(message.reason)
        elif message.number in self._asked:
            future, on_progress = self._asked[message.number]
            if future.done():
                return
            if isinstance(message, Progress):
                if on_progress is not None:
                    on_progress(message.stage, message.fraction, *message.preview)
            elif isinstance(message, Outcome):
                self._answered = True
                future.set_result(message.value)
            else:
                future.set_exception(_failure(message))

    def end(self, reason: str) -> None:
        """Leave the rotation at once. Its process may take longer to end, for which ``supervise`` waits."""
        self._broken = reason
        self._set("failed", reason)
        self._lose(reason)
        if self._link is not None:
            self._link.close()
        self._changed()

    def _set(self, status: str, reason: str) -> None:
        idle = {"active": [], "queue_depth": 0, "memory": None, "step_seconds": None}
        self._health = {
            "name": "",
            "ticks": {},
            "at_once": self.capacity,
            **self._health,
            **idle,
            "status": status,
            "reason": reason,
        }


def _failure(message: Failure) -> Exception:
    if message.kind == "input":
        return ValueError(message.message)
    return DeadlineExceeded(LATE) if message.kind == "late" else StageFailed(message.message)


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Await the work to its end, even when cancelled meanwhile; then pass the cancellation on."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
