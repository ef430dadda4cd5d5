"""Waiting for what another process, thread or task brings about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], seconds: float = 40.0, every: float = 0.005) -> None:
    """Returns once ``condition()`` is true, which is looked at ``every`` so many seconds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing tells of it: it is another's state
            await asyncio.sleep(every)
