"""An event loop in virtual time: hours of waiting pass in seconds, and in the same order as they would.

Time stands still while anything can run or a thread is at work, and jumps to the next timer when nothing can. There is
no real network in such a loop.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

# Where virtual clocks start: some moment of unix time that is no whole second.
EPOCH = 1_800_000_000.25

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """In place of waiting, moves the loop's clock."""

    loop: VirtualTimeLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.loop.jobs:
            # A thread's end wakes the selector; until then no virtual time passes.
            return super().select(None if timeout is None or timeout > 0 else 0)
        if timeout is None:
            raise RuntimeError("virtual time has come to an end: nothing is scheduled and nothing can run")
        if timeout > 0:
            self.loop.elapsed += timeout
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.loop = self
        self.elapsed = 0.0
        self.jobs = 0
        super().__init__(selector)

    def time(self) -> float:
        return self.elapsed

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        self.jobs += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._job_done)
        return future

    def _job_done(self, _: asyncio.Future[Any]) -> None:
        self.jobs -= 1

    async def shutdown_default_executor(self) -> None:
        self.jobs += 1
        await super().shutdown_default_executor()
        self.jobs -= 1


def now() -> float:
    """Unix seconds of the running loop, virtual or not."""
    return EPOCH + asyncio.get_running_loop().time()


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
