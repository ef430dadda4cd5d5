"""Group normalisation of small channels-last images, forward and backward, in one Triton kernel each.

A program reads some groups of one sample twice. They fit into its cache. For larger images there are the kernels of
`group_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from generation.accelerate.kernels.group_norm import (
    Norm,
    Statistics,
    merge_moments,
    new_statistics,
    silu_backward,
    welford_step,
)

PROGRAMS = 256  # target number of programs: two per multiprocessor of a large GPU
WIDEST = 256  # channels per program, at most
VECTOR = 8  # channels of one vectorised load, where a program's groups are aligned to it
VALUES = 8192  # per block; half as many backward, where registers would otherwise allow one program at a time
STAGES = 3  # blocks that are prefetched (Triton's num_stages); one less backward, where two images are read
WARPS = 8
TINY = 64  # pixels of an image for which half the values and warps are enough
SMALL = 1024  # pixels of an image, at most


def is_small(x: Tensor) -> bool:
    """Whether the images of x (N, C, H, W) have at most SMALL pixels."""
    return x.shape[-2] * x.shape[-1] <= SMALL


def normalise_small(
    x: Tensor, norm: Norm, added: Tensor | None = None, silu: bool = True, statistics: Statistics | None = None
) -> Tensor:
    """Group normalisation of x (N, C, H, W), channels last, + `added` (C,) or (N, C), with SiLU if asked.

    Fills in `statistics`, if given: the backward pass needs them.
    """
    result = torch.empty_like(x)
    more = norm.weight if added is None else added
    each_sample = 0 if added is None or added.ndim == 1 else added.stride(0)
    grid, sizes = _launch(x, norm, VALUES, STAGES)
    _normalise_kernel[grid](
        *(x, more, result, norm.weight, norm.bias, *(statistics or [norm.weight] * 4)),
        *(x.shape[2] * x.shape[3], x.shape[1], each_sample, norm.eps),
        ADDED=added is not None, SILU=silu, STORE=statistics is not None, **sizes,
    )  # fmt: skip
    return result


def forward_small(x: Tensor, norm: Norm, added: Tensor | None) -> tuple[Tensor, Statistics]:
    """SiLU of the normalised x + `added` (C,) or (N, C), and the statistics for `backward_small`."""
    statistics = new_statistics(x)
    return normalise_small(x, norm, added, statistics=statistics), statistics


def backward_small(
    gradient: Tensor, x: Tensor, statistics: Statistics, norm: Norm, residual: Tensor | None = None
) -> Tensor:
    """See `group_norm.normalise_backward`."""
    result = torch.empty_like(x)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    other = x if residual is None else residual.contiguous(memory_format=torch.channels_last)
    grid, sizes = _launch(x, norm, VALUES // 2, STAGES - 1)
    _backward_kernel[grid](
        *(gradient, x, other, result, norm.weight, *statistics, x.shape[2] * x.shape[3], x.shape[1]),
        RESIDUAL=residual is not None, **sizes,
    )  # fmt: skip
    return result


def _launch(x: Tensor, norm: Norm, values: int, stages: int) -> tuple[tuple[int, int], dict[str, Any]]:
    n, c, height, width = x.shape
    each = c // norm.groups
    mine = groups_of_a_program(n, norm.groups, each)
    lanes = triton.next_power_of_2(mine * each)
    parts = 2 if height * width <= TINY else 1
    rows = min(triton.next_power_of_2(height * width), max(1, values // parts // lanes))
    sizes = {
        "GROUPS": mine,
        "EACH": each,
        "GROUP_LANES": triton.next_power_of_2(mine),
        "LANES": lanes,
        "ROWS": rows,
        "BLOCKS": triton.cdiv(height * width, rows),
        "STAGES": stages,
        "num_warps": WARPS // parts,
    }
    return (norm.groups // mine, n), sizes


def groups_of_a_program(n: int, groups: int, each: int) -> int:
    """The most groups per program that leave PROGRAMS programs. Multiples of VECTOR channels where possible."""
    fitting = [mine for mine in range(1, groups + 1) if groups % mine == 0 and mine * each <= WIDEST] or [1]
    whole = [mine for mine in fitting if mine * each % VECTOR == 0] or fitting[-1:]
    return max((mine for mine in whole if n * (groups // mine) >= PROGRAMS), default=whole[0])


@triton.jit
def _sum_groups(values, EACH: tl.constexpr, LANES: tl.constexpr, GROUP_LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each channel (LANES,) the sum of `values` over its group."""
    member = (tl.arange(0, LANES) // EACH)[:, None] == tl.arange(0, GROUP_LANES)[None, :]
    sums = tl.sum(tl.where(member, values[:, None], 0.0), 0)
    return tl.sum(tl.where(member, sums[None, :], 0.0), 1)


@triton.jit
def _normalise_kernel(  # type: ignore[no-untyped-def]
    x, added, result, weight, bias, scales, shifts, inverses, offsets, pixels, c, added_stride, eps,
    ADDED: tl.constexpr, SILU: tl.constexpr, STORE: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, GROUP_LANES: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    lane, row = tl.arange(0, LANES), tl.arange(0, ROWS)
    mine = lane < GROUPS * EACH
    channel = tl.program_id(0) * (GROUPS * EACH) + lane
    x += n * pixels * c + tl.program_id(0) * (GROUPS * EACH)
    result += n * pixels * c + tl.program_id(0) * (GROUPS * EACH)
    means = tl.zeros((ROWS, LANES), tl.float32)  # by place in a block: threads merge theirs once, at the end
    squares = tl.zeros((ROWS, LANES), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        mask = (block * ROWS + row < pixels)[:, None] & mine[None, :]
        value = tl.load(x + (block * ROWS + row)[:, None] * c + lane[None, :], mask, 0.0).to(tl.float32)
        means, squares = welford_step(means, squares, value, mask, block)
    counts = tl.minimum(tl.maximum(pixels - row + ROWS - 1, 0) // ROWS, BLOCKS)
    lane_means, lane_squares = merge_moments(means, squares, counts.to(tl.float32), pixels)
    more = tl.zeros((LANES,), tl.float32)
    if ADDED:
        more = tl.load(added + n * added_stride + channel, mine, 0.0).to(tl.float32)
        lane_means += more
    mean = _sum_groups(lane_means, EACH, LANES, GROUP_LANES) / EACH
    delta = lane_means - mean
    variance = _sum_groups(lane_squares + pixels * delta * delta, EACH, LANES, GROUP_LANES) / (pixels * EACH)
    inverse = tl.rsqrt(variance + eps)
    scale = inverse * tl.load(weight + channel, mine, 0.0).to(tl.float32)
    offset = more - mean
    shift = tl.load(bias + channel, mine, 0.0).to(tl.float32) + offset * scale
    if STORE:
        tl.store(scales + n * c + channel, scale, mine)
        tl.store(shifts + n * c + channel, shift, mine)
        tl.store(inverses + n * c + channel, inverse, mine)
        tl.store(offsets + n * c + channel, offset, mine)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        mask = (block * ROWS + row < pixels)[:, None] & mine[None, :]
        places = (block * ROWS + row)[:, None] * c + lane[None, :]
        value = tl.load(x + places, mask, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(result + places, value.to(result.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    gradient, x, residual, result, weight, scales, shifts, inverses, offsets, pixels, c,
    RESIDUAL: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, GROUP_LANES: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    lane, row = tl.arange(0, LANES), tl.arange(0, ROWS)
    mine = lane < GROUPS * EACH
    channel = tl.program_id(0) * (GROUPS * EACH) + lane
    begin = n * pixels * c + tl.program_id(0) * (GROUPS * EACH)
    scale = tl.load(scales + n * c + channel, mine, 0.0)
    shift = tl.load(shifts + n * c + channel, mine, 0.0)
    r = tl.load(inverses + n * c + channel, mine, 0.0)
    o = tl.load(offsets + n * c + channel, mine, 0.0)
    first = tl.zeros((ROWS, LANES), tl.float32)
    second = tl.zeros((ROWS, LANES), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        mask = (block * ROWS + row < pixels)[:, None] & mine[None, :]
        places = begin + (block * ROWS + row)[:, None] * c + lane[None, :]
        value = tl.load(x + places, mask, 0.0).to(tl.float32)
        outer = tl.load(gradient + places, mask, 0.0).to(tl.float32)
        inner = silu_backward(outer, value, scale[None, :], shift[None, :])
        first += inner
        second += inner * (value + o[None, :])
    w = tl.load(weight + channel, mine, 0.0).to(tl.float32)
    mean = _sum_groups(w * tl.sum(first, 0), EACH, LANES, GROUP_LANES) / (pixels * EACH)
    along = _sum_groups(w * r * tl.sum(second, 0), EACH, LANES, GROUP_LANES) / (pixels * EACH)
    by_x = -r * r * along
    constant = by_x * o - r * mean
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        mask = (block * ROWS + row < pixels)[:, None] & mine[None, :]
        places = begin + (block * ROWS + row)[:, None] * c + lane[None, :]
        value = tl.load(x + places, mask, 0.0).to(tl.float32)
        outer = tl.load(gradient + places, mask, 0.0).to(tl.float32)
        inner = silu_backward(outer, value, scale[None, :], shift[None, :])
        out = inner * scale[None, :] + value * by_x[None, :] + constant[None, :]
        if RESIDUAL:
            out += tl.load(residual + places, mask, 0.0).to(tl.float32)
        tl.store(result + places, out.to(result.dtype.element_ty), mask)
