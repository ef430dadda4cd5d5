"""Progress of requests as server-sent events. They never contain prompts or pictures.

Engines report progress from their own threads and never wait here: for a slow listener, old events are dropped.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from generation.engine.engine import Unavailable, priority
from generation.web.errors import ApiError
from generation.web.time_left import TimeLeft

MAX_LISTENERS = 32
MAX_PENDING = 256  # events of one listener
KEEP_ALIVE_S = 15.0
MAX_STALL_S = 60.0  # a listener that reads nothing for longer is disconnected
MAX_WAIT_S = 30.0  # that a listener to an id waits for its request to arrive
LISTENER_RETRY_S = 5
STOP_S = 1.0  # for listeners to read their last events, when the service ends
# nginx keeps the events of a stream back until its end, unless it is told not to.
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Following:
    """A request in progress, as listeners see it."""

    def __init__(self, events: Events, request_id: str, background: bool) -> None:
        self.request_id = request_id
        self.background = background
        self.stage = ""
        self._paused_at = 0.0  # on time.monotonic(), while its stage is "paused"
        self.latest = b""  # its latest event
        self.ended = False
        self.report: Any = None  # once there is a result
        self._events = events
        self._time_left = events.time_left.begin("")

    def queued(self, kind: str) -> None:
        """The request was received completely. Requests of the same ``kind`` take about the same time."""
        self._time_left = self._events.time_left.begin(kind)
        self.show("queued", 0.0, None)  # how long it waits depends on other requests

    def progress(self, stage: str, fraction: float) -> None:
        """Progress of a stage, 0..1. May be called from any thread."""
        if stage == "paused":
            if self.stage != "paused":
                self._paused_at = time.monotonic()
                self.show(stage, fraction, None)
            return
        if self.stage == "paused":
            self._time_left.delay(time.monotonic() - self._paused_at)
        self.show(stage, fraction, self._time_left.reached(stage, fraction, time.monotonic()))

    def show(self, stage: str, fraction: float, seconds: float | None) -> None:
        self.stage = stage
        about: dict[str, Any] = {"request_id": self.request_id, "priority": priority(self.background), "stage": stage}
        about |= {"fraction": round(fraction, 4), "eta_seconds": None if seconds is None else round(seconds, 1)}
        self._events.publish(self, "progress", about)

    def end(self, outcome: str, reason: str | None, score: float | None = None) -> None:
        """Publish the outcome. A request with a score went through all stages, so its times enter the averages."""
        if score is not None:
            self._time_left.finished(time.monotonic())
        about = {"request_id": self.request_id, "outcome": outcome, "score": score, "reason": reason}
        self._events.publish(self, "end", about)


class Events:
    """All requests in progress and all listeners."""

    def __init__(self) -> None:
        self.time_left = TimeLeft()
        self._lock = threading.Lock()
        self._in_progress: dict[str, Following] = {}
        self._listeners: set[Listener] = set()
        self._closed = False

    @contextmanager
    def request(self, request_id: str, background: bool = False) -> Iterator[Following]:
        """A request, in progress inside of the ``with``. Raises ApiError when its id is in use."""
        following = Following(self, request_id, background)
        with self._lock:
            if request_id in self._in_progress:
                raise ApiError(409, "X-Request-Id", "a request with this id is in progress", "one at a time")
            self._in_progress[request_id] = following
        following.show("receiving", 0.0, None)
        try:
            yield following
        finally:
            with self._lock:
                del self._in_progress[request_id]

    @contextmanager
    def listen(self, request_id: str | None) -> Iterator[Listener]:
        """Listen to one request, in progress or soon to come; None: to all. Raises Unavailable when too many listen."""
        with self._lock:
            if self._closed:
                raise Unavailable("the service is shutting down", None)
            if len(self._listeners) >= MAX_LISTENERS:
                raise Unavailable(f"{MAX_LISTENERS} listeners to events are the limit", LISTENER_RETRY_S)
            listener = Listener(request_id)
            self._listeners.add(listener)
            for following in self._in_progress.values():
                if listener.wants(following.request_id):
                    listener.offer("progress", following.latest)
        try:
            yield listener
        finally:
            with self._lock:
                self._listeners.discard(listener)

    def publish(self, following: Following, kind: str, about: dict[str, Any]) -> None:
        event = encode(kind, about)
        with self._lock:
            if following.ended:  # an engine's last progress may come late
                return
            following.latest, following.ended = event, kind == "end"
            for listener in self._listeners:
                if listener.wants(following.request_id):
                    listener.offer(kind, event)

    def close(self) -> None:
        """Disconnect all listeners. For the asyncio thread, before the server waits for open responses."""
        with self._lock:
            self._closed = True
            for listener in self._listeners:
                listener.close()
            self._listeners.clear()


class Listener:
    """One client's pending events. ``offer`` may be called from any thread, the rest on the asyncio thread."""

    def __init__(self, request_id: str | None) -> None:
        self._request_id = request_id
        self._lock = threading.Lock()
        self._pending: deque[tuple[str, bytes]] = deque()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._closed = False
        self.patience = asyncio.timeout(None)

    def wants(self, request_id: str) -> bool:
        return self._request_id in (None, request_id)

    def offer(self, kind: str, event: bytes) -> None:
        with self._lock:
            if len(self._pending) == MAX_PENDING:  # drop the oldest progress event; "end" events are kept
                oldest = (index for index, (kind, _) in enumerate(self._pending) if kind == "progress")
                del self._pending[next(oldest, 0)]
            self._pending.append((kind, event))
            if len(self._pending) == 1:
                self._loop.call_soon_threadsafe(self._changed.set)

    def close(self) -> None:
        self._closed = True
        self._changed.set()
        self._be_patient(STOP_S)

    def _be_patient(self, seconds: float) -> None:
        with suppress(RuntimeError):  # the time has just run out
            self.patience.reschedule(self._loop.time() + seconds)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Events, and keep-alive comments between them, until the request or the service ends."""
        yield b": listening\n\n"
        give_up = None if self._request_id is None else self._loop.time() + MAX_WAIT_S
        while True:
            now = self._loop.time()
            if not self._closed:
                self._be_patient(KEEP_ALIVE_S + MAX_STALL_S)
            try:
                async with asyncio.timeout_at(min(now + KEEP_ALIVE_S, give_up or now + KEEP_ALIVE_S)):
                    await self._changed.wait()
            except TimeoutError:
                if give_up is not None and self._loop.time() >= give_up:
                    yield self._unknown(f"no request with this id came within {MAX_WAIT_S:.0f} s")
                    return
                yield b": keep-alive\n\n"
            with self._lock:
                self._changed.clear()
                pending = list(self._pending)
                self._pending.clear()
            if pending:
                give_up = None
                yield b"".join(event for _, event in pending)
            if self._request_id is not None and any(kind == "end" for kind, _ in pending):
                return
            if self._closed:
                yield self._unknown("the service is shutting down")
                return

    def _unknown(self, reason: str) -> bytes:
        return encode("end", {"request_id": self._request_id, "outcome": "unknown", "score": None, "reason": reason})


class EventStream(StreamingResponse):
    """The response to a listener, closed when the client reads nothing for too long."""

    def __init__(self, events: Events, request_id: str | None) -> None:
        super().__init__((), headers=_HEADERS, media_type="text/event-stream")
        self._events, self._request_id = events, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._events.listen(self._request_id) as listener, suppress(TimeoutError):
            self.body_iterator = listener.stream()
            async with listener.patience:
                await super().__call__(scope, receive, send)


def encode(kind: str, about: dict[str, Any]) -> bytes:
    """One event in the wire format, on one line: JSON escapes line ends."""
    return f"event: {kind}\ndata: {json.dumps(about)}\n\n".encode()
