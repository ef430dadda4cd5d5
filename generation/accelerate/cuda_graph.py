"""A guidance's step as compiled kernels in a CUDA graph, one for each number of scenes.

Launched one by one, the some thousand kernels of a step cost the CPU more time than they cost the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# How many scenes the kernels are compiled for; other numbers are put together from these.
COMPILED_SIZES = (4, 2, 1)


def pieces(scenes: int) -> list[slice]:
    """`scenes` cut into as few pieces as the compiled sizes allow."""
    cuts, start = [], 0
    for size in COMPILED_SIZES:
        while start + size <= scenes:
            cuts.append(slice(start, start + size))
            start += size
    return cuts


class _Graph(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Captured:
    """Calls a function of tensors; for shapes that were captured, by replaying its kernels.

    The function must not wait for the device. Results are overwritten by the next call.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._forgotten: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}  # inputs of what is captured again when called
        self._pool: Any = None  # of memory, for all graphs: they never run at the same time

    def capture(self, *inputs: Tensor, constants: tuple[Any, ...] = ()) -> None:
        """Compile what is to be compiled, and record the kernels for the shapes of `inputs`, which are kept."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
            for _ in range(2):  # the first call compiles and chooses algorithms
                self._function(*inputs, *constants)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._function(*inputs, *constants)
        self._pool = self._pool or graph.pool()
        self._graphs[_key(inputs, constants)] = _Graph(graph, inputs, outputs)

    def forget(self) -> None:
        """Drop all graphs and their memory, for what they read is about to move. Each is captured again when called."""
        self._forgotten |= {key: graph.inputs for key, graph in self._graphs.items()}
        self._graphs.clear()
        self._pool = None

    def __call__(self, *inputs: Tensor, constants: tuple[Any, ...] = ()) -> tuple[Tensor, ...]:
        key = _key(inputs, constants)
        if (static_inputs := self._forgotten.pop(key, None)) is not None:
            self.capture(*static_inputs, constants=constants)
        captured = self._graphs.get(key)
        if captured is None:
            return self._function(*inputs, *constants)
        for static, value in zip(captured.inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.outputs


def _key(inputs: tuple[Tensor, ...], constants: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*((tuple(value.shape), value.dtype) for value in inputs), *constants)
