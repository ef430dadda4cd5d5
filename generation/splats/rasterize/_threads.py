"""Running a compiled kernel over ranges on all cores.

A plain pool of Python threads: the kernels release the interpreter's lock. Unlike numba's own parallel loops it needs
no OpenMP or TBB, which would compete with torch's threads, and may be called from any number of threads.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

CHUNKS_PER_THREAD = 8  # pieces are claimed as threads come free, since tiles differ in cost


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="rasterize")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def for_ranges(kernel: Callable[..., None], count: int, *args: Any) -> None:
    """Call kernel(start, stop, *args) so that the ranges cover 0 to count, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        kernel(0, count, *args)
        return
    chunks = min(count, threads * CHUNKS_PER_THREAD)
    claim = itertools.count()

    def work() -> None:
        while (i := next(claim)) < chunks:
            kernel(i * count // chunks, (i + 1) * count // chunks, *args)

    futures = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for future in futures:
        if not future.cancel():  # a thread that has not even started, on a busy machine, is not waited for
            future.result()
