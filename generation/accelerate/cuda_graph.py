"""Functions of tensors as CUDA graphs, one graph for each shape of the inputs.

A denoising step has about a thousand kernels. Launching them one by one takes the CPU longer than the GPU needs to run
them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

#: Batch sizes that are compiled and captured, largest first. Other sizes are split into these.
COMPILED_SIZES = (4, 2, 1)


def split_batch(count: int) -> list[slice]:
    """Slices that cover ``range(count)``, as few as COMPILED_SIZES allow."""
    slices, start = [], 0
    for size in COMPILED_SIZES:
        while start + size <= count:
            slices.append(slice(start, start + size))
            start += size
    return slices


#: All graphs of this process, which has one GPU. They never run at the same time, so they share one memory pool: it is
#: as large as the largest of them needs, and not their sum.
_alive: WeakSet[Any] = WeakSet()


@cache
def _stream() -> Any:
    """Of all warm-ups: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


def compiled_sizes(most: int) -> list[int]:
    """Sizes of the slices that up to ``most`` are split into, largest first."""
    return [size for size in COMPILED_SIZES if size <= most]


class _Graph(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class GraphedFunction:
    """A function of tensors. For shapes that were captured, a call replays a CUDA graph.

    The function must not synchronise with the device.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._forgotten: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}  # inputs; captured again at the next call

    def capture(self, *inputs: Tensor, constants: tuple[Any, ...] = ()) -> None:
        """Warm the function up, then capture it for the shapes of ``inputs``. The graph keeps ``inputs`` as its own.

        Capture the largest shape first: what a smaller one needs then fits into the memory of the larger one.
        """
        stream = _stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
            for _ in range(2):  # the first call compiles and chooses algorithms
                self._function(*inputs, *constants)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A pool is gone with its last graph, and its name can not be used again.
        pool = next((other.pool() for other in _alive), None)
        with torch.cuda.graph(graph, pool=pool):
            outputs = self._function(*inputs, *constants)
        _alive.add(graph)
        self._graphs[_key(inputs, constants)] = _Graph(graph, inputs, outputs)

    def forget(self) -> None:
        """Drop all graphs and their memory, because the weights that they read are about to move.

        Each is captured again at its next call.
        """
        self._forgotten |= {key: graph.inputs for key, graph in self._graphs.items()}
        self._graphs.clear()

    def __call__(self, *inputs: Tensor, constants: tuple[Any, ...] = ()) -> tuple[Tensor, ...]:
        key = _key(inputs, constants)
        if key not in self._graphs and (static_inputs := self._forgotten.get(key)) is not None:
            self.capture(*static_inputs, constants=constants)  # when memory is full the next call tries again
            del self._forgotten[key]
        captured = self._graphs.get(key)
        if captured is None:
            return self._function(*inputs, *constants)
        for static, value in zip(captured.inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)  # the next replay of any graph may overwrite them


def _key(inputs: tuple[Tensor, ...], constants: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*((tuple(value.shape), value.dtype) for value in inputs), *constants)
