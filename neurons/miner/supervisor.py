"""Keeps the miner's parts running after errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

FIRST_RESTART_S = 1.0
MAX_RESTART_S = 60.0

log = logging.getLogger(__name__)


async def keep_running(name: str, part: Callable[[], Awaitable[None]]) -> None:
    """Runs `part` until it returns. After an error, logs it and runs the part again, with growing pauses.

    A CancelledError without a request to cancel counts as an error: the chain's client cancels its own futures when a
    request fails, and such a cancellation would silently end the part.
    """
    clock = asyncio.get_running_loop().time
    pause = FIRST_RESTART_S
    while True:
        started = clock()
        try:
            await part()
            return
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            if clock() - started > MAX_RESTART_S:
                pause = FIRST_RESTART_S
            log.exception("%s broke; it starts again in %.0f s", name, pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_RESTART_S)
