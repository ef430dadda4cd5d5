"""Fewer at once when the GPU's memory is full, and more again when it has not been for a while."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

log = logging.getLogger("generation.pipeline.batch_limit")

#: how many requests must go well, one after the other, before one more at once is tried
SUCCESSES_BEFORE_MORE = 20

T = TypeVar("T")
R = TypeVar("R")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a full GPU is behind ``error``: it, or one that it was raised from or while handling."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        # what comes from CUDA itself and not from torch's allocator, such as loading a kernel
        if isinstance(error, torch.AcceleratorError) and "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def release_cache() -> None:
    """Give back the memory that torch keeps for later use. No exception may be in handling: its frames hold tensors."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


class BatchLimit:
    """How many may run together now: from 1 to ``most``."""

    def __init__(self, most: int) -> None:
        self.maximum = most
        self.current = most
        self._successes = 0

    def out_of_memory(self, together: int) -> None:
        """``together`` at once were too many: half of them from now on."""
        self.current = max(1, min(self.current, together // 2))
        self._successes = 0
        log.warning("Out of GPU memory with %d at once; at most %d from now on", together, self.current)

    def succeeded(self) -> None:
        """A request came to its result. After GOOD_BEFORE_MORE in a row there may be one more at once."""
        if self.current == self.maximum:
            return
        self._successes += 1
        if self._successes >= SUCCESSES_BEFORE_MORE:
            self.current += 1
            self._successes = 0
            log.info(
                "Enough GPU memory for the last %d requests; at most %d at once from now on",
                SUCCESSES_BEFORE_MORE,
                self.current,
            )


def in_batches(limit: BatchLimit, items: Sequence[T], work: Callable[[list[T]], Sequence[R]]) -> list[R]:
    """``work`` on all items, in order, as many at once as ``limit`` lets; ``work`` gives one result for each.

    A batch that runs out of memory is done again in smaller ones, so ``work`` must leave nothing half done.
    Raises what ``work`` raises, an out-of-memory error only when it comes with one item alone.
    """
    results: list[R] = []
    while len(results) < len(items):
        batch = list(items[len(results) : len(results) + limit.current])
        try:
            results += work(batch)
        except Exception as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
        else:
            continue
        limit.out_of_memory(len(batch))
        release_cache()  # here the exception is gone, and with it what its frames held
    return results
