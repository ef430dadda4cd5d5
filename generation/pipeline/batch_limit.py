"""Batch limits: halved when the GPU is out of memory, raised again one by one after enough successes."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

log = logging.getLogger("generation.pipeline.batch_limit")

#: successful requests in a row before the limit is raised by one
SUCCESSES_BEFORE_MORE = 20

T = TypeVar("T")
R = TypeVar("R")

# What torch says for cuBLAS and its kind: "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
_LIBRARY_IS_FULL = re.compile(r"(CUDA|cuDNN) error: CU[A-Z]+_STATUS_\w*ALLOC\w*_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or one in its chain of causes and contexts, says that the GPU is out of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        # raised by CUDA itself and not by torch's allocator, for example while a kernel is loaded
        if isinstance(error, torch.AcceleratorError) and "out of memory" in str(error):
            return True
        if isinstance(error, RuntimeError) and _LIBRARY_IS_FULL.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def release_cache() -> None:
    """Empty torch's cache of free memory. Not while an exception is handled: its frames hold tensors."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


class BatchLimit:
    """How many may run in one batch: ``current``, from 1 to ``maximum``."""

    def __init__(self, most: int) -> None:
        self.maximum = most
        self.current = most
        self._successes = 0

    def out_of_memory(self, together: int) -> None:
        """A batch of ``together`` was too large. Limit batches to half of it."""
        self.current = max(1, min(self.current, together // 2))
        self._successes = 0
        log.warning("Out of GPU memory with %d at once; at most %d from now on", together, self.current)

    def succeeded(self) -> None:
        """A request succeeded. After SUCCESSES_BEFORE_MORE in a row the limit is raised by one."""
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
    """Results of ``work`` for all items, in order, in batches of at most ``limit``. ``work`` returns one per item.

    A batch that runs out of memory is retried in smaller ones, so ``work`` must have no side effects when it fails.
    Raises what ``work`` raises; an out-of-memory error only from a single item.
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
        release_cache()  # after the except block, so that the exception's frames hold no tensors
    return results
