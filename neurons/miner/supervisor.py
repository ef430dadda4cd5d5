"""Keeps the miner's parts running, whatever breaks in them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

FIRST_RESTART_S = 1.0
MAX_RESTART_S = 60.0

log = logging.getLogger(__name__)


async def keep_running(name: str, part: Callable[[], Awaitable[None]]) -> None:
    """Runs `part` until it returns. When it breaks, logs why and starts it again, later and later."""
    clock = asyncio.get_running_loop().time
    pause = FIRST_RESTART_S
    while True:
        started = clock()
        try:
            await part()
            return
        except Exception:
            if clock() - started > MAX_RESTART_S:
                pause = FIRST_RESTART_S
            log.exception("%s broke; it starts again in %.0f s", name, pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_RESTART_S)
