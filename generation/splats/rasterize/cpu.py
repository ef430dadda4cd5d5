"""Rasterising on a CPU: two autograd functions around numba kernels, the projected centres in the graph between."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from generation.splats.cameras import Cameras
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import _blending, _projection
from generation.splats.rasterize._threads import for_ranges

MAX_BATCH = 2**18  # splats per batch without gradients: 16 MiB
MAX_ENTRIES = 2**26  # 0.8 GiB of tile lists, and 2.4 GiB in the backward pass


def rasterize(
    gaussians: Gaussians, cameras: Cameras, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Arguments and results as the package's `rasterize`, background (C, 3)."""
    if not torch.is_grad_enabled() and len(cameras) > 1 and len(cameras) * len(gaussians) > MAX_BATCH:
        half = len(cameras) // 2
        rgb, alpha, info = rasterize(gaussians, cameras[:half], width, height, background[:half])
        rgb2, alpha2, info2 = rasterize(gaussians, cameras[half:], width, height, background[half:])
        joined = {name: torch.cat([info[name], info2[name]]) for name in info}
        return torch.cat([rgb, rgb2]), torch.cat([alpha, alpha2]), joined
    means2d, splats, depths, radii = _Project.apply(
        *gaussians.tensors().values(), cameras.viewmats, cameras.Ks, cameras.positions, width, height
    )
    rgb, alpha = _Blend.apply(means2d, splats, background, depths, width, height)
    return rgb, alpha, {"means2d": means2d, "radii": radii, "depths": depths}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


class _Project(torch.autograd.Function):
    """Gaussians to splats; see _projection for the layouts."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, width, height = inputs
        arrays = [_array(tensor) for tensor in tensors]
        n, views = len(arrays[0]), len(arrays[5])
        means2d, splats = torch.empty(views, n, 2), torch.empty(views, n, _projection.SPLAT)
        depths, radii = torch.empty(views, n), torch.empty(views, n, dtype=torch.int32)
        outputs = (means2d, splats, depths, radii)
        ctx.size = (np.float32(width), np.float32(height))
        for_ranges(_projection.project, n, *arrays, *ctx.size, *(output.numpy() for output in outputs))
        ctx.save_for_backward(*tensors, splats, radii)
        ctx.mark_non_differentiable(depths, radii)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        saved = [_array(tensor) for tensor in ctx.saved_tensors]
        results = [torch.empty(array.shape) for array in saved[:5]]
        for_ranges(
            _projection.project_backward, len(saved[0]), *saved[:8], *ctx.size, *saved[8:],
            *(_array(grad) for grad in grads[:2]), *(result.numpy() for result in results),
        )  # fmt: skip
        return (*results, None, None, None, None, None)


class _Blend(torch.autograd.Function):
    """Splats to images; see _blending for the tiles."""

    @staticmethod
    def forward(ctx: Any, means2d: Tensor, splats: Tensor, background: Tensor, depths: Tensor,
                width: int, height: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        views, n = depths.shape
        lines = _array(splats)
        size = (np.float32(width), np.float32(height))
        wide, high = -(-width // _blending.TILE), -(-height // _blending.TILE)

        order = np.empty((views, n), np.int32)
        drawn, bounds = np.empty(views, np.int64), np.empty(views, np.int64)
        for_ranges(_blending.sort_and_count, views, *size, lines, _array(depths), order, drawn, bounds)
        view_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(bounds)])
        if view_start[-1] > MAX_ENTRIES:
            raise ValueError(
                f"gaussians are too large: counted for each of them and each view they cover {view_start[-1]} tiles of "
                f"{_blending.TILE} x {_blending.TILE} pixels, at most {MAX_ENTRIES} are accepted"
            )
        tile_ranges = np.empty((views * wide * high, 2), np.int64)
        entries = np.empty((view_start[-1], 3), np.int32)
        slot_start = np.empty((views, n + 1), np.int32)
        for_ranges(
            _blending.fill_tiles, views, *size, lines, order, drawn, view_start, wide, high,
            tile_ranges, entries, slot_start,
        )  # fmt: skip

        rgb, alpha = torch.empty(views, height, width, 3), torch.empty(views, height, width, 1)
        for_ranges(
            _blending.blend, len(tile_ranges), lines, tile_ranges, entries, wide, high,
            _array(background), rgb.numpy(), alpha.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(splats, rgb, alpha)
        ctx.lists = (tile_ranges, entries, wide, high)
        ctx.slots = (order, drawn, slot_start)
        return rgb, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        splats, rgb, alpha = (_array(tensor) for tensor in ctx.saved_tensors)
        v_rgb, v_alpha = (_array(grad) for grad in grads)
        tile_ranges, entries, *_ = ctx.lists
        parts = np.empty((len(entries), _blending.PARTS), np.float32)
        for_ranges(_blending.blend_backward, len(tile_ranges), splats, *ctx.lists, rgb, alpha, v_rgb, v_alpha, parts)
        views, n = splats.shape[:2]
        v_means2d, v_splats = torch.zeros(views, n, 2), torch.zeros(splats.shape)
        for_ranges(_blending.sum_parts, n, parts, *ctx.slots, v_means2d.numpy(), v_splats.numpy())
        v_background = None
        if ctx.needs_input_grad[2]:
            v_background = (grads[0] * (1.0 - ctx.saved_tensors[2])).sum(dim=(1, 2))
        return v_means2d, v_splats, v_background, None, None, None
