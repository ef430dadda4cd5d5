"""A client's connection, which is not held open without a request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds from the connection's start, or from an answer, to the next request's head. What is left of the body of a
#: request that was answered early is read and dropped in this time: a client may send it all before it reads.
REQUEST_S = 60.0


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, which by itself waits for a first request, or for the rest of one, for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_deadline()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _await_request(self) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(REQUEST_S, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return  # a request is in progress, and its end sets the next deadline
        if self.transport.get_write_buffer_size():
            self._await_request()  # its answer is still being read; TCP ends that when it stalls
        else:
            self.transport.abort()
