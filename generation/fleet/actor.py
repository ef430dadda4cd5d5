"""An engine as an actor on a machine of a Ray cluster, as ``generation.fleet.worker`` is one as a process.

``generation.fleet.actors`` supervises it. Messages are pickled here and not by Ray, as they are for a process.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import platform
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import psutil

from common.version import VERSION
from generation.engine.engine import describe
from generation.fleet.messages import Broken, Resolve, Resolved, Start, State
from generation.fleet.ray_environment import ROOT
from generation.fleet.worker import FLUSH_S, EngineProcess, LogForwarder
from generation.logging_setup import install

#: Bytes of messages per ``collect``, beyond the first message: small messages do not wait for many large ones.
PARCEL_BYTES = 1 << 20


@cache
def software() -> str:
    """The versions that must be equal at the service and at the engine, in words."""
    digest = hashlib.sha256()
    for folder in ("common", "generation"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"version {VERSION} with code {digest.hexdigest()[:12]} on Python {platform.python_version()}"


class Mailbox:
    """The engine's end of the link, in place of a ``Channel``: the service calls to collect what is sent."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._outgoing: deque[bytes] = deque()
        self._state = b""
        self._changed, self._new_state = asyncio.Event(), asyncio.Event()
        self._flushing: list[threading.Event] = []
        self.on_message: Callable[[Any], object] = lambda message: None

    def start(self, on_message: Callable[[Any], object], on_end: Callable[[], object]) -> None:
        """``on_end`` is not used: Ray ends actors with the service that made them."""
        self.on_message = on_message

    def send(self, message: Any) -> None:
        """Returns at once, on any thread. Raises what pickle does when the message can not be pickled."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._loop.call_soon_threadsafe(self._put_state if isinstance(message, State) else self._put, data)

    def _put(self, data: bytes) -> None:
        self._outgoing.append(data)
        self._changed.set()

    def _put_state(self, data: bytes) -> None:
        self._state = data
        self._new_state.set()

    def flush(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds until everything was collected. Not on the asyncio thread."""
        arrived = threading.Event()
        self._loop.call_soon_threadsafe(self._flushing.append, arrived)
        arrived.wait(timeout)

    async def collect(self) -> list[bytes]:
        """Wait for messages, and return those not collected yet, in order. The next call confirms that they arrived."""
        if not self._outgoing:
            for arrived in self._flushing:
                arrived.set()
            self._changed.clear()
            await self._changed.wait()
        parcel = [self._outgoing.popleft()]
        size = len(parcel[0])
        while self._outgoing and (size := size + len(self._outgoing[0])) <= PARCEL_BYTES:
            parcel.append(self._outgoing.popleft())
        return parcel

    async def state(self) -> bytes:
        """Wait for the next state."""
        self._new_state.clear()
        await self._new_state.wait()
        return self._state


class EngineActor:
    """The class that ``generation.fleet.cluster`` makes an actor of."""

    def __init__(self) -> None:
        self._mailbox: Mailbox
        self._work: asyncio.Task[None]

    async def about(self) -> tuple[str, int]:
        """Its software, in words, and its PID."""
        return software(), os.getpid()

    async def begin(self, data: bytes) -> None:
        """Start the engine by a pickled ``Resolve``. Returns at once; ``collect`` brings the outcome."""
        message: Resolve = pickle.loads(data)
        # Ray sets it to 1 for an actor without CPUs of its own. torch, which reads it, is not imported yet.
        os.environ["OMP_NUM_THREADS"] = str(message.threads)
        self._mailbox = Mailbox()
        install([LogForwarder(self._mailbox)])
        self._work = asyncio.get_running_loop().create_task(self._run(message))

    async def _run(self, message: Resolve) -> None:
        try:
            await _end_of(message.after)
            settings = await asyncio.to_thread(message.function)
            self._mailbox.send(Resolved(settings))
            await EngineProcess(self._mailbox, Start(settings, message.loader)).run()
        except BaseException as error:
            self._mailbox.send(Broken(f"its settings can not be resolved: {describe(error)}"))
            await asyncio.to_thread(self._mailbox.flush, FLUSH_S)
            os._exit(1)

    async def tell(self, data: bytes) -> None:
        self._mailbox.on_message(pickle.loads(data))

    async def collect(self) -> list[bytes]:
        return await self._mailbox.collect()

    async def state(self) -> bytes:
        return await self._mailbox.state()


async def _end_of(process: int | None) -> None:
    """Wait for that process to end, since only then is its GPU's memory free. Ray reports the end too early."""
    with suppress(psutil.NoSuchProcess):
        before = None if process is None else psutil.Process(process)
        while before is not None and before.is_running() and before.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.05)
