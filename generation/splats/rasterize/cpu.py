"""Rasterising on a CPU: two autograd functions around numba kernels, with the projected centres in the graph between."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from generation.splats.cameras import Cameras
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import _blending, _projection
from generation.splats.rasterize._threads import for_ranges


def rasterize(
    gaussians: Gaussians, cameras: Cameras, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Arguments and results as the package's `rasterize`, background (C, 3)."""
    means2d, splats, depths, radii, boxes = _Project.apply(
        *gaussians.tensors().values(), cameras.viewmats, cameras.Ks, cameras.positions, width, height
    )
    rgb, alpha = _Blend.apply(means2d, splats, background, depths, boxes, width, height)
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
        means2d, splats = torch.empty(views, n, 2), torch.empty(views, n, 7)
        depths, radii = torch.empty(views, n), torch.empty(views, n, dtype=torch.int32)
        boxes = torch.empty(views, n, 4, dtype=torch.int32)
        outputs = (means2d, splats, depths, radii, boxes)
        ctx.size = (np.float32(width), np.float32(height))
        for_ranges(_projection.project, n, *arrays, *ctx.size, *(output.numpy() for output in outputs))
        ctx.save_for_backward(*tensors, splats, radii)
        ctx.mark_non_differentiable(depths, radii, boxes)
        return outputs

    @staticmethod
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
    def forward(ctx: Any, means2d: Tensor, splats: Tensor, background: Tensor, depths: Tensor, boxes: Tensor,
                width: int, height: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs = tuple(_array(tensor) for tensor in (means2d, splats, boxes))
        views, n = depths.shape
        wide, high = -(-width // _blending.TILE), -(-height // _blending.TILE)
        order = np.empty((views, n), np.int32)
        drawn, entries = np.empty(views, np.int64), np.empty(views, np.int64)
        for_ranges(_blending.sort_and_count, views, depths.numpy(), inputs[2], order, drawn, entries)

        view_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(entries)])
        total = int(view_start[-1])
        tile_start = np.full(views * wide * high + 1, total, np.int64)
        entry_splat, entry_slot = np.empty(total, np.int32), np.empty(total, np.int64)
        slot_start = np.empty((views, n), np.int64)
        tiles = (tile_start, entry_splat, entry_slot, slot_start)
        for_ranges(_blending.fill_tiles, views, inputs[2], order, drawn, view_start, wide, high, *tiles)

        rgb, alpha = torch.empty(views, height, width, 3), torch.empty(views, height, width, 1)
        for_ranges(
            _blending.blend, views * wide * high, *inputs, tile_start, entry_splat, wide, high,
            _array(background), rgb.numpy(), alpha.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(means2d, splats, boxes, rgb, alpha)
        ctx.tiles, ctx.size = tiles, (wide, high)
        return rgb, alpha

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        v_rgb, v_alpha = grads
        means2d, splats, boxes, rgb, alpha = (_array(tensor) for tensor in ctx.saved_tensors)
        tile_start, entry_splat, entry_slot, slot_start = ctx.tiles
        wide, high = ctx.size
        parts = np.empty((len(entry_splat), _blending.PARTS), np.float32)
        for_ranges(
            _blending.blend_backward, len(tile_start) - 1, means2d, splats, boxes, tile_start, entry_splat, entry_slot,
            wide, high, rgb, alpha, _array(v_rgb), _array(v_alpha), parts,
        )  # fmt: skip
        v_means2d, v_splats = torch.empty(means2d.shape), torch.empty(splats.shape)
        for_ranges(
            _blending.sum_parts, slot_start.size, parts, slot_start, boxes, v_means2d.numpy(), v_splats.numpy()
        )
        v_background = None
        if ctx.needs_input_grad[2]:
            v_background = (v_rgb * (1.0 - ctx.saved_tensors[4])).sum(dim=(1, 2))
        return v_means2d, v_splats, v_background, None, None, None, None
