"""Keeps the miner's parts running, whatever breaks in them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

FIRST_RESTART_S = 1.0
MAX_RESTART_S = 60.0

log = logging.getLogger(__name__)


async def keep_running(name: str, part: Callable[[], Awaitable[None]]) -> None:
    """Runs `part` until it returns. When it breaks, logs why and starts it again, later and later.

    A cancellation that nobody asked for is a break as well: the chain's client cancels futures of its own when a
    request fails, and one that comes through would end the part without a word.
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
