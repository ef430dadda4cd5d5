"""Messages between the service and an engine, pickled; on one machine over a socket of a connected pair."""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from generation.schema.results import Request

log = logging.getLogger("generation.fleet.messages")

_LENGTH = struct.Struct("!Q")

# ---- to the engine's process ----


@dataclass(frozen=True)
class Start:
    """The first message: load a pipeline. ``loader`` is "module:function", called as function(settings, progress)."""

    settings: Any
    loader: str


@dataclass(frozen=True)
class Resolve:
    """The first message to an engine on another machine: call ``function`` there to get its settings, then load.

    ``threads``: the engine's share of that machine's CPU cores. ``after``: PID of the process that had its GPU before.
    """

    function: Callable[[], Any]
    loader: str
    threads: int
    after: int | None = None


@dataclass(frozen=True)
class Generate:
    """Make a splat."""

    number: int
    request: Request
    wants_progress: bool


@dataclass(frozen=True)
class Call:
    """Run ``function(pipeline)``. Both the function and what it returns must be picklable."""

    number: int
    function: Callable[[Any], Any]
    background: bool


@dataclass(frozen=True)
class Cancel:
    """Cancel the request with this number."""

    number: int


# ---- from the engine's process ----


@dataclass(frozen=True)
class Resolved:
    """The settings that ``Resolve`` gave."""

    settings: Any


@dataclass(frozen=True)
class State:
    """The engine's state, sent at short regular intervals. A process that stops sending it hangs."""

    models: list[dict[str, Any]]
    health: dict[str, Any]  # the entry of ``Engine.health``


@dataclass(frozen=True)
class Progress:
    """Progress of a request: its stage, and the fraction of that stage, 0..1."""

    number: int
    stage: str
    fraction: float
    preview: tuple[bytes, ...] = ()  # one WEBP, if the request asked for previews


@dataclass(frozen=True)
class Outcome:
    """The result of a request."""

    number: int
    value: Any


@dataclass(frozen=True)
class Failure:
    """An error, by kind. ``input``: ValueError of a call. ``stage``: StageFailed. ``late``: DeadlineExceeded."""

    number: int
    kind: Literal["input", "stage", "late"]
    message: str


@dataclass(frozen=True)
class Log:
    """A log record for the service to write."""

    record: dict[str, Any]  # attributes of a logging.LogRecord


@dataclass(frozen=True)
class Broken:
    """The last message: the process has become unreliable, as after a CUDA error."""

    reason: str


class Channel:
    """One end of a socket for messages, which arrive in order. ``close`` or the other end's death ends both ways."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="channel writer", daemon=True)

    def start(self, on_message: Callable[[Any], object], on_end: Callable[[], object]) -> None:
        """Both callbacks come from a thread of the channel; ``on_end`` comes once, after the last message."""

        def read() -> None:
            try:
                while True:
                    on_message(self.receive())
            except (OSError, EOFError):
                pass
            except Exception:  # such as a function that the other process does not know
                log.exception("A message could not be taken")
            self.close()
            self._writer.join()
            self._socket.close()
            on_end()

        self._writer.start()
        threading.Thread(target=read, name="channel reader", daemon=True).start()

    def send(self, message: Any) -> None:
        """Returns at once. Raises what pickle does when the message can not be pickled."""
        self._outgoing.put(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def receive(self) -> Any:
        """Wait for the next message. Raises EOFError or OSError when the channel is closed."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return pickle.loads(self._read(length))

    def flush(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds until everything is written. Nothing can be sent afterwards."""
        self._outgoing.put(None)
        self._writer.join(timeout)

    def close(self) -> None:
        self._outgoing.put(None)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (data := self._outgoing.get()) is not None:
                self._socket.sendall(_LENGTH.pack(len(data)))
                self._socket.sendall(data)

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise EOFError
            view = view[count:]
        return data
