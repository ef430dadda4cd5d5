"""The engine's process: runs an engine for the service. It ends when its link to ``generation.fleet.remote`` closes."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import pkgutil
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from common.log_lines import SingleLineFormatter
from generation.engine.engine import DeadlineExceeded, Engine, Unavailable, describe
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
from generation.logging_setup import install
from generation.schema.results import Asset

STATE_INTERVAL_S = 0.2
FLUSH_S = 5.0
LOST_MARKS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "CUDNN_STATUS_EXECUTION_FAILED")

_PR_SET_PDEATHSIG = 1

log = logging.getLogger("generation.fleet.worker")


class ServiceEnd(Protocol):
    """The engine's end of the link to the service: a ``Channel``, or a ``generation.fleet.actor.Mailbox``."""

    def start(self, on_message: Callable[[Any], object], on_end: Callable[[], object]) -> None:
        """Both callbacks may come from any thread."""

    def send(self, message: Any) -> None:
        """Returns at once, on any thread. Raises what pickle does when the message can not be pickled."""

    def flush(self, timeout: float) -> None:
        """Wait until all is sent."""


class LogForwarder(logging.Handler):
    """Sends log records to the service, which alone writes the log. Tracebacks are formatted here."""

    def __init__(self, channel: ServiceEnd) -> None:
        super().__init__()
        self._channel = channel
        self._formatter = SingleLineFormatter()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            attributes = {name: getattr(record, name) for name in ("name", "levelno", "levelname", "created", "msecs")}
            trace = self._formatter.formatException(record.exc_info) if record.exc_info else None
            self._channel.send(Log({**attributes, "msg": record.getMessage(), "exc_text": trace}))
        except Exception:
            self.handleError(record)  # a broken log line must not fail its caller


class EngineProcess:
    """Handles the service's messages with an ``Engine`` around the loader's pipeline."""

    def __init__(self, channel: ServiceEnd, start: Start) -> None:
        settings = start.settings

        def load(progress: Callable[[str], None]) -> Any:
            progress("importing torch and the model libraries")
            return pkgutil.resolve_name(start.loader)(settings, progress)

        self._channel = channel
        self._tasks: dict[int, asyncio.Task[None]] = {}
        # The fleet limits how many requests wait; here there is no limit.
        self._engine = Engine(load, sys.maxsize, settings.models.max_batch, settings.device)

    async def run(self) -> None:
        """Run until the service is gone, or this process has become unreliable."""
        loop = asyncio.get_running_loop()
        self._engine.start()
        # At once, whatever is under way: without its service an engine has nothing to finish.
        self._channel.start(lambda message: loop.call_soon_threadsafe(self._take, message), lambda: os._exit(0))
        while True:
            if self._engine.status == "failed":
                await self._give_up(self._engine.reason)
            self._channel.send(State(self._engine.models, self._engine.health()[0]))
            await asyncio.sleep(STATE_INTERVAL_S)

    def _take(self, message: Any) -> None:
        if isinstance(message, Cancel):
            if message.number in self._tasks:
                self._tasks[message.number].cancel()
            return
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._tasks[message.number] = task
        task.add_done_callback(lambda _: self._tasks.pop(message.number))

    async def _generate(self, message: Generate) -> Asset:
        def progress(stage: str, fraction: float, *preview: bytes) -> None:
            self._channel.send(Progress(message.number, stage, fraction, preview))

        on_progress = progress if message.wants_progress else None
        asset = await self._engine.generate(message.request, on_progress)
        return replace(asset, gaussians=None)  # they are on the device, and the PLY has the same content

    async def _answer(self, message: Generate | Call) -> None:
        number = message.number
        try:
            if isinstance(message, Generate):
                self._channel.send(Outcome(number, await self._generate(message)))
            else:
                self._channel.send(Outcome(number, await self._engine.call(message.function, message.background)))
        except DeadlineExceeded as error:
            self._channel.send(Failure(number, "late", str(error)))
        except ValueError as error:
            self._channel.send(Failure(number, "input", str(error)))
        except Unavailable:  # it takes all requests, unless it broke
            await self._give_up(self._engine.reason)
        except Exception as error:
            if cause := _lost_device(error):
                await self._give_up(f"the device failed: {cause}")
            self._channel.send(Failure(number, "stage", str(error)))

    async def _give_up(self, reason: str) -> None:
        self._channel.send(Broken(reason))
        await asyncio.to_thread(self._channel.flush, FLUSH_S)
        os._exit(1)  # no clean exit: the device thread may hang, and so may CUDA's own clean-up


def _lost_device(error: BaseException | None) -> str | None:
    """The CUDA error behind ``error`` after which every later CUDA call of this process fails; None if there is none.

    Out of memory is not one.
    """
    found = None
    while error is not None:
        text = str(error)
        passes = "out of memory" in text or "ALLOC_FAILED" in text
        if any(mark in text for mark in LOST_MARKS) and not passes:
            found = describe(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return found


def die_with(service: int) -> None:
    """Have the kernel kill this process when its parent, of PID ``service``, has ended (PR_SET_PDEATHSIG).

    No thread of ours could do it: gsplat holds Python's lock while it waits for a GPU, for ever if that hangs. The
    signal follows the parent's thread that forked us, which is the event loop's and lives as long as the service.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != service:  # it ended before
        os._exit(0)


def main() -> None:
    """Run an engine until its socket is closed."""
    die_with(int(sys.argv[2]))
    # Signals to the whole group or service unit: the service decides how long requests in flight may take.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda *_: None)
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    channel = Channel(end)
    install([LogForwarder(channel)])
    asyncio.run(EngineProcess(channel, channel.receive()).run())


if __name__ == "__main__":
    main()
