"""Generation services in virtual time, without HTTP, and a pool of two of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from neurons.miner.generation.pool import GeneratorPool
from neurons.miner.generation.service import HEALTH_TIMEOUT_S, EndpointUnavailable, Generated
from neurons.protocol import Task, TextTask
from scripts.bench import virtual_time
from scripts.bench.virtual_time import now

TASK = TextTask(id="1", prompt="p")


class Service:
    """`outcomes` are what the next tasks get: a number of seconds, or an error. After them `seconds`."""

    def __init__(self, endpoint: str, seconds: float = 10.0, at_once: int = 1) -> None:
        self.endpoint = endpoint
        self.seconds = seconds
        self.outcomes: deque[float | Exception] = deque()
        self.is_rejecting = False
        self.score: float | None = None  # of what is rejected
        self.asked: list[float] = []
        self.cancelled = 0
        self.status: str | Exception | None = "ready"
        self.fails_after: float | None = None
        self._slots = asyncio.Semaphore(at_once)

    async def health(self) -> str | None:
        if self.status is None:
            await asyncio.sleep(HEALTH_TIMEOUT_S)
            return None
        if isinstance(self.status, Exception):
            raise self.status
        return self.status

    async def generate(self, task: Task, seed: int, *effort: Any) -> Generated:
        self.asked.append(now())
        if self.fails_after is not None:
            await asyncio.sleep(self.fails_after)
            raise EndpointUnavailable("gone while at work")
        outcome = self.outcomes.popleft() if self.outcomes else self.seconds
        if isinstance(outcome, Exception):
            raise outcome
        try:
            async with self._slots:
                await asyncio.sleep(outcome)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.is_rejecting:
            return Generated(b"", self.score, str(seed), "nothing in the picture", self.endpoint)
        return Generated(b"ply", 0.8, str(seed), "", self.endpoint)


def with_pool(test: Callable[[GeneratorPool, Service, Service], Awaitable[None]]) -> None:
    """Runs `test` in virtual time with a pool of two services."""

    async def main() -> None:
        first, second = Service("http://first"), Service("http://second")
        pool = GeneratorPool([first, second], now)
        watching = asyncio.create_task(pool.watch())
        await pool.ready.wait()
        await asyncio.sleep(0)
        await test(pool, first, second)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    virtual_time.run(main())
