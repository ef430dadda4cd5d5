"""A worker process as the service sees it: its requests, its supervision, its restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal

from generation.engine.engine import LATE, DeadlineExceeded, OnProgress, StageFailed
from generation.fleet.messages import (
    Broken,
    Call,
    Cancel,
    Channel,
    Failure,
    Generate,
    Log,
    Outcome,
    Progress,
    Start,
    State,
)
from generation.schema.results import Asset, Request

#: Before a process that ended is started again, in seconds: doubled with each one in a row that answered nothing.
FIRST_PAUSE_S = 5.0
MAX_PAUSE_S = 300.0
#: A process in rotation that says nothing for so long hangs, and is killed: a look every CHECK_S, so many in a row.
CHECK_S = 2.0
SILENT_CHECKS = 30
#: A step of an engine that takes so long will never end: its GPU hangs.
STUCK_S = 120.0
#: Neither will a start. The longest one known compiles for six minutes.
LOADING_S = 1800.0
#: What an idle process gets to end in when its socket closes.
ENDING_S = 2.0

log = logging.getLogger("generation.fleet.remote")


class EngineLost(Exception):
    """The engine's process ended, or can not be relied on any more, before it answered."""


class NotSent(Exception):
    """The engine left the rotation before it was told of the request, which so can not be the cause."""


class RemoteEngine:
    """Everything is done on the asyncio thread. ``changed`` is called when the engine joins or leaves the rotation.

    ``device`` is "cuda:N" as this process counts its GPUs, and the only one that the engine's process will see; any
    other name is a name and no more.
    """

    def __init__(self, device: str, capacity: int, start: Start, changed: Callable[[], None]) -> None:
        self.device = device
        self.models: list[dict[str, Any]] = []
        self.generations = self.calls = 0  # in flight; the fleet counts
        self.interactive = 0  # of the generations
        #: Whether an isolated request runs here, and its priority: no other one of that priority is put beside it.
        self.isolates: Literal["interactive", "background"] | None = None
        #: Whether it works, or its start may yet succeed: False in the pause after one that did not.
        self.hopeful = True
        self.next_start = 0.0  # on time.monotonic(), while it is "failed"
        self.capacity = capacity
        self._start = start
        self._changed = changed
        self._health: dict[str, Any] = {}  # as the engine's entry, but for the device
        self._set("loading", "starting")
        self._was_ready = self._answered = False  # since the worker's start
        self._lost = 0  # requests, with this worker
        self._channel: Channel
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[asyncio.Future[Any], OnProgress | None]] = {}
        self._heard = False
        self._ended = False  # the channel to the worker: nothing that is sent arrives any more
        self._broken = ""  # what it, or we, said was wrong

    @property
    def status(self) -> str:
        """As an ``Engine``'s: "loading", "ready" (in rotation) or "failed" (until it is started again)."""
        return str(self._health["status"])

    @property
    def reason(self) -> str:
        return str(self._health["reason"])

    @property
    def load(self) -> float:
        """What is in flight, in shares of what the engine takes at once."""
        return (self.generations + self.calls) / self.capacity

    @property
    def in_rotation(self) -> bool:
        """Whether it can be asked: it is ready, and its process is not known to have ended."""
        return self.status == "ready" and not self._ended

    def has_room(self, background: bool, isolated: bool = False) -> bool:
        """For one more generation; ``isolated``: for one that is to have the engine for itself.

        A request in the background would only wait behind an interactive one, so it is not put beside one. No request
        joins an isolated one, but for one case: an isolated request in the background is paused while an interactive
        one runs. So it can not take that one with it, and a person does not wait for it.
        """
        if isolated:
            return not self.generations
        if background:
            return self.generations < self.capacity and not self.interactive and self.isolates is None
        return self.interactive < self.capacity and self.isolates != "interactive"

    def health(self) -> dict[str, Any]:
        return {**self._health, "device": self.device}

    async def generate(self, request: Request, on_progress: OnProgress | None = None) -> Asset:
        """As ``Engine.generate``, but raises EngineLost when the process ends first, and NotSent when it had."""
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
        self._channel.send(message)
        self._asked[message.number] = (future, on_progress)
        try:
            return await future
        except asyncio.CancelledError:
            self._channel.send(Cancel(message.number))
            raise
        finally:
            del self._asked[message.number]

    async def supervise(self) -> None:
        """Starts the worker, and starts it again whenever it ends. Cancelling this ends the worker."""
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
        """Fail the requests that wait for an answer with EngineLost."""
        waiting = [future for future, _ in self._asked.values() if not future.done()]
        for future in waiting:
            future.set_exception(EngineLost(reason))
        self._lost += len(waiting)

    async def _run_worker(self) -> str:
        """From a worker's start to its end. Returns the cause of the end in words."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        self._broken, self._ended = "", False
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-m", "generation.fleet.worker", str(number), str(os.getpid())]
            try:  # on this thread, with which the process will end: see generation.fleet.worker.die_with
                process = subprocess.Popen(  # noqa: ASYNC220
                    command, pass_fds=[number], stdin=subprocess.DEVNULL, env=_environment(self.device)
                )
            except OSError as error:
                ours.close()
                return f"its process can not be started: {error}"
        self._channel = Channel(ours)
        self._channel.start(
            lambda message: loop.call_soon_threadsafe(self._take, message),
            lambda: loop.call_soon_threadsafe(self._end_of_channel, ended),
        )
        self._channel.send(self._start)
        try:
            await self._watch(process, ended)
        finally:
            await _uninterrupted(self._end(process, ended))
        if self._broken:
            return self._broken
        if process.returncode < 0:
            return f"its process was killed by {signal.Signals(-process.returncode).name}"
        return f"its process ended with exit status {process.returncode}"

    def _end_of_channel(self, ended: asyncio.Event) -> None:
        self._ended = True
        ended.set()

    async def _end(self, process: subprocess.Popen[bytes], ended: asyncio.Event) -> None:
        self._channel.close()
        await ended.wait()
        await _finish(process)

    async def _watch(self, process: subprocess.Popen[bytes], ended: asyncio.Event) -> None:
        """Returns when the worker ends, says nothing for too long, or does not get ready."""
        silent, started = 0, time.monotonic()
        while not ended.is_set() and process.poll() is None and silent < SILENT_CHECKS:
            self._heard = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await ended.wait()
            silent = silent + 1 if self.status == "ready" and not self._heard else 0
            if self.status == "loading" and time.monotonic() - started > LOADING_S:
                self._break(f"it was not ready after {LOADING_S:g} s, at: {self.reason}")
        if silent == SILENT_CHECKS:
            self._break(f"its process said nothing for {SILENT_CHECKS * CHECK_S:.0f} s")

    def _take(self, message: Any) -> None:
        if self._broken:
            return  # what was still on its way
        self._heard = True
        if isinstance(message, State):
            joins = self.status != "ready" and message.health["status"] == "ready"
            self._health, self.models = message.health, message.models
            self.capacity = message.health["at_once"]
            if (message.health["step_seconds"] or 0.0) > STUCK_S:
                self._break(f"a step has taken over {STUCK_S:g} s")
                return
            if joins:
                self._was_ready = True
                self._changed()
        elif isinstance(message, Log):
            name = message.record["name"]
            record = logging.makeLogRecord({**message.record, "name": f"{name}[{self.device}]"})
            logging.getLogger(name).handle(record)
        elif isinstance(message, Broken):
            self._break(message.reason)
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

    def _break(self, reason: str) -> None:
        """Leave the rotation at once: a process may take long to end, which is up to its supervisor."""
        self._broken = reason
        self._set("failed", reason)
        self._lose(reason)
        self._channel.close()
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


def _environment(device: str) -> dict[str, str]:
    """This process's own, with no GPU to be seen but ``device``."""
    environment = dict(os.environ)
    kind, _, index = device.partition(":")
    if kind == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index
    return environment


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Await its end, and be cancelled only then."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def _finish(process: subprocess.Popen[bytes]) -> None:
    """Wait until it has ended, by force if need be: only then is its GPU's memory free."""
    end = time.monotonic() + ENDING_S
    while process.poll() is None:
        if time.monotonic() >= end:
            process.kill()
        await asyncio.sleep(0.02)
