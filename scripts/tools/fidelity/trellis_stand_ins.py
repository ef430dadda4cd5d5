"""Stand-ins for packages that TRELLIS's code imports.

spconv is a dense convolution whose outputs are masked, xformers is PyTorch's own attention.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from scripts.tools.fidelity.comparison import borrowed


class SparseConvTensor:
    """As much of spconv's as the authors' SparseTensor touches."""

    def __init__(self, features: Tensor, indices: Tensor, spatial_shape: Any, batch_size: int, *more: Any) -> None:
        self._features, self.indices, self.spatial_shape, self.batch_size = features, indices, spatial_shape, batch_size
        self.grid, self.voxel_num, self.indice_dict = (*more, None, None, None)[:3]
        self.benchmark = self.benchmark_record = self.thrust_allocator = self._timer = None
        self.force_algo = self.int8_scale = None

    @property
    def features(self) -> Tensor:
        return self._features


class SubMConv3d(nn.Module):
    """A dense convolution whose outputs are taken where inputs are."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **_: Any) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.zeros(out_channels, *(kernel_size,) * 3, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, data: SparseConvTensor) -> SparseConvTensor:
        sample, x, y, z = data.indices.long().unbind(1)
        side = int(data.indices[:, 1:].max()) + 1
        grid = data.features.new_zeros(data.batch_size, data.features.shape[1], side, side, side)
        grid[sample, :, x, y, z] = data.features
        out = F.conv3d(grid, self.weight.permute(0, 4, 1, 2, 3), self.bias, padding=1)
        return SparseConvTensor(out[sample, :, x, y, z], data.indices, data.spatial_shape, data.batch_size)


class BlockDiagonalMask:
    def __init__(self, rows: list[int], columns: list[int] | None) -> None:
        self.rows, self.columns = rows, columns or rows

    @classmethod
    def from_seqlens(cls, rows: list[int], columns: list[int] | None = None) -> BlockDiagonalMask:
        return cls(rows, columns)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockDiagonalMask | None = None) -> Tensor:
    """(1, tokens, heads, width)."""
    allowed = None
    if mask is not None:
        allowed = torch.block_diag(
            *(torch.ones(r, c) for r, c in zip(mask.rows, mask.columns, strict=True))
        ).bool()  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


def quaternions(matrices: Any) -> Any:
    return Rotation.from_matrix(matrices).as_quat(scalar_first=True)


def matrices(quaternions: Any) -> Any:
    return Rotation.from_quat(quaternions, scalar_first=True).as_matrix()


class EasyDict(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


@contextmanager
def authors(folder: Path) -> Iterator[Callable[[str], Any]]:
    """A function that imports a module of TRELLIS's authors, with all that it wants stood in for."""
    stand_ins = ("xformers", "xformers.ops", "spconv", "spconv.pytorch", "easydict", "utils3d", "rembg", "trellis",
                 "trellis.representations", "trellis.pipelines", "trellis.models.structured_latent_vae")  # fmt: skip
    with (
        borrowed(folder, *stand_ins),
        patch.dict(os.environ, {"ATTN_BACKEND": "sdpa", "SPARSE_ATTN_BACKEND": "xformers"}),
        patch.object(torch.Tensor, "cuda", lambda self: self),
    ):
        operations = SimpleNamespace(
            memory_efficient_attention=attention, fmha=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
        )
        sparse = SimpleNamespace(SparseConvTensor=SparseConvTensor, SubMConv3d=SubMConv3d)
        modules: dict[str, Any] = sys.modules
        modules["xformers"].ops = modules["xformers.ops"] = operations
        modules["spconv"].pytorch = modules["spconv.pytorch"] = sparse
        modules["easydict"].EasyDict = EasyDict
        modules["utils3d"].numpy = MagicMock(quaternion_to_matrix=matrices, matrix_to_quaternion=quaternions)
        for name in (name for name in stand_ins if name.startswith("trellis")):
            # Without what their __init__ imports, which is everything.
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = [str(folder / name.replace(".", "/"))]
        gaussian = importlib.import_module("trellis.representations.gaussian.gaussian_model").Gaussian
        gaussian.__init__.__defaults__ = (*gaussian.__init__.__defaults__[:-1], "cpu")
        modules["trellis.representations"].Gaussian = gaussian
        try:
            yield importlib.import_module
        finally:
            for name in [name for name in sys.modules if name.startswith("trellis.")]:
                del sys.modules[name]  # folders without an __init__ say of no file that they are from
