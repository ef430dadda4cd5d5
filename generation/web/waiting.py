"""Waits for a result while the client does."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from generation.engine.engine import Unavailable

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``. When the client disconnects, cancels it and raises ClientDisconnect.

    Raises Unavailable when the server ends with the request unfinished. To be called once the request's body is read:
    after that, the only message left is the disconnect.
    """

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    except asyncio.CancelledError:  # the server's patience with requests in flight is over
        raise Unavailable("the service is shutting down", None) from None
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
