"""A GPU that only pretends: tensors "on" it say that they are, and compute on the CPU.

What a GPU refuses fails here too: operands on two devices, weights that are offloaded, and, where a CUDA graph would be
captured, copies between host and device and whatever the host must wait for. A generator of the other device is not
noticed, and there is no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar
from unittest import mock
from weakref import WeakSet

import torch
import torch._dynamo  # before anything that it looks at is patched
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from generation.accelerate import cuda_graph
from generation.accelerate.kernels import group_norm

DEVICE = torch.device("cuda:0")
_aten = torch.ops.aten
#: host and device may meet in these
_COPIES = {_aten._to_copy, _aten.copy_, _aten.copy}
#: their indices may be on the host
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
#: the host waits for their results
_WAITS = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.unique_consecutive, _aten._unique2,
    _aten.equal, _aten.is_nonzero, _aten.unique_dim, _aten.bincount,
}  # fmt: skip


class GpuTensor(Tensor):
    """``held`` computes. ``is_there`` is False while a parameter's data are offloaded."""

    held: Tensor
    is_there: bool

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        self: GpuTensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        self.held, self.is_there = inner, True
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        setter: Any = Tensor.data
        setter.__set__(self, value if isinstance(value, GpuTensor) else GpuTensor(value))
        self.held, self.is_there = getattr(value, "held", value), isinstance(value, GpuTensor)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class Generator(torch.Generator):
    """``torch.Generator``, on the CPU, for either device."""

    where: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls)
        self.where = torch.device(device)
        return self

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE if self.where.type == "cuda" else self.where


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_capturing = False


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet, given = func.overloadpacket, [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    on_gpu = [each for each in given if isinstance(each, GpuTensor)]
    wanted = kwargs.get("device")
    result_on_gpu = bool(on_gpu) if wanted is None else torch.device(wanted).type == "cuda"
    if any(not each.is_there for each in on_gpu) and packet not in (_aten.detach, _aten._to_copy):
        raise RuntimeError(f"{func}: a tensor is on the CPU: it is offloaded")
    if on_gpu:
        others = [each for each in given if not isinstance(each, GpuTensor)]
        if packet in _INDEXING:
            others = [each for each in others if each is args[0]]
        if packet not in _COPIES and any(each.ndim for each in others):
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
    if _capturing:
        crosses = packet in _COPIES and (
            (packet is _aten._to_copy and bool(on_gpu) != result_on_gpu)
            or (packet is not _aten._to_copy and 0 < len(on_gpu) < len(given))
        )
        by_mask = packet in _INDEXING and any(each.dtype == torch.bool for each in given[1:])
        if crosses or by_mask or packet in _WAITS or (packet in _INDEXING and len(on_gpu) < len(given)):
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    plain_args, plain = tree_map(lambda each: getattr(each, "held", each), (args, kwargs))
    out = (_flash_attention if packet is _aten._flash_attention_forward else func)(*plain_args, **plain)
    if not result_on_gpu:
        return args[0] if packet is _aten.copy_ else out
    out = tree_map(lambda each: GpuTensor(each) if isinstance(each, Tensor) else each, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, longest: int, longest_keys: int, *_: Any
) -> tuple[Tensor, ...]:
    """What the CPU has not, with what PyTorch's mha_varlen_fwd asks for. It sees no more than ``longest`` tokens."""
    for each in (q, k, v):
        assert each.dtype in (torch.float16, torch.bfloat16)
        assert each.dtype == q.dtype
        assert each.shape[1:] == q.shape[1:]
        assert each.shape[-1] in range(8, 257, 8)
        assert each.stride(-1) == 1
    for each in (starts, key_starts):
        assert each.dtype == torch.int32
        assert each.is_contiguous()
        assert each.shape == starts.shape
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    ends = zip(starts.unfold(0, 2, 1).tolist(), key_starts.unfold(0, 2, 1).tolist(), strict=True)
    for (first, last), (first_key, last_key) in ends:
        rows, keys = slice(first, min(last, first + longest)), slice(first_key, min(last_key, first_key + longest_keys))
        if first < last:
            query, key, value = (each.transpose(0, 1)[None] for each in (q[rows], k[keys], v[keys]))
            out[rows] = F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1)
    nothing = torch.zeros(0)
    return out, nothing, nothing, nothing, nothing


class _Graph:
    """Replayed, it computes again from the same tensors and writes over the same results, and over all other graphs'.

    They share one memory pool.
    """

    alive: ClassVar[WeakSet[_Graph]] = WeakSet()

    def __init__(self, function: Callable[[], tuple[Tensor, ...]]) -> None:
        self._function = function
        self.outputs = self._captured()
        self.alive.add(self)

    def _captured(self) -> tuple[Tensor, ...]:
        global _capturing
        _capturing = True
        try:
            outputs = self._function()
        finally:
            _capturing = False
        assert all(isinstance(each, GpuTensor) for each in outputs)
        return outputs

    def replay(self) -> None:
        for other in self.alive:
            for output in other.outputs:
                output.detach().zero_()
        for old, new in zip(self.outputs, self._captured(), strict=True):
            old.detach().copy_(new.detach())


def _capture(self: cuda_graph.GraphedFunction, *inputs: Tensor, constants: tuple[Any, ...] = ()) -> None:
    assert all(isinstance(each, GpuTensor) for each in inputs), "a CUDA graph's inputs are on the GPU"
    graph = _Graph(lambda: self._function(*inputs, *constants))
    self._graphs[cuda_graph._key(inputs, constants)] = cuda_graph._Graph(graph, inputs, graph.outputs)


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Within it "cuda" is there. Nothing is compiled, and Triton's kernels must not be reached."""
    patches: list[tuple[Any, str, Any]] = [
        (cuda_graph.GraphedFunction, "capture", _capture),
        (torch, "Generator", Generator),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "device", lambda device: nullcontext()),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch, "_has_compatible_shallow_copy_type", lambda a, b: isinstance(a, GpuTensor) == isinstance(b, GpuTensor)),
        (torch, "compile", lambda function, **options: function),
        (nn.Module, "compile", lambda module, **options: None),
        (Tensor, "pin_memory", lambda tensor: tensor.clone()),
        (group_norm, "add", lambda x, y, bias: x + y + bias.view(1, -1, 1, 1)),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, where there is no driver
        stack.enter_context(_Mode())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its on the CPU first
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield
