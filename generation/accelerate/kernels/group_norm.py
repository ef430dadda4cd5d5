"""Group normalisation of small channels-last images, forward and backward, in one Triton kernel each.

A program goes through some groups of one sample twice, which fit into its cache. Larger images need the kernels of
`normalise`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from generation.accelerate.kernels.normalise import (
    Norm,
    Statistics,
    before_silu,
    new_statistics,
    one_more,
    over_places,
)

PROGRAMS = 256  # as a target: two for each processor of a large GPU
WIDEST = 256  # channels of a program
VECTOR = 8  # channels that are read at once, where a program's groups begin and end with them
VALUES = 8192  # of a block; backward half as many, or their registers would let one program run at a time
STAGES = 3  # blocks that memory is asked for ahead; backward, where there are two images, one less
WARPS = 8
TINY = 64  # pixels, of which half as many values and warps are enough
SMALL = 1024  # pixels of an image, at most


def is_small(x: Tensor) -> bool:
    return x.shape[-2] * x.shape[-1] <= SMALL


def normalise_at_once(
    x: Tensor, norm: Norm, added: Tensor | None = None, silu: bool = True, statistics: Statistics | None = None
) -> Tensor:
    """The normalised x (N, C, H, W), channels last, + `added` (C,) or (N, C); SiLU of it if asked.

    Fills in the `statistics` (see `normalise`) that the backward pass needs, where there are some.
    """
    result = torch.empty_like(x)
    more = norm.weight if added is None else added
    each_sample = 0 if added is None or added.ndim == 1 else added.stride(0)
    grid, sizes = _programs(x, norm, VALUES, STAGES)
    _normalise[grid](
        *(x, more, result, norm.weight, norm.bias, *(statistics or [norm.weight] * 4)),
        *(x.shape[2] * x.shape[3], x.shape[1], each_sample, norm.eps),
        ADDED=added is not None, SILU=silu, STORE=statistics is not None, **sizes,
    )  # fmt: skip
    return result


def forward_at_once(x: Tensor, norm: Norm, added: Tensor | None) -> tuple[Tensor, Statistics]:
    """SiLU of the normalised x + `added`, and what `backward_at_once` needs."""
    statistics = new_statistics(x)
    return normalise_at_once(x, norm, added, statistics=statistics), statistics


def backward_at_once(
    gradient: Tensor, x: Tensor, statistics: Statistics, norm: Norm, around: Tensor | None = None
) -> Tensor:
    """See `normalise_backward`."""
    result = torch.empty_like(x)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    other = x if around is None else around.contiguous(memory_format=torch.channels_last)
    grid, sizes = _programs(x, norm, VALUES // 2, STAGES - 1)
    _backward[grid](
        *(gradient, x, other, result, norm.weight, *statistics, x.shape[2] * x.shape[3], x.shape[1]),
        AROUND=around is not None, **sizes,
    )  # fmt: skip
    return result


def _programs(x: Tensor, norm: Norm, values: int, stages: int) -> tuple[tuple[int, int], dict[str, Any]]:
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
    """As many as leave enough programs for the GPU; fewer only where whole vectors are read."""
    fitting = [mine for mine in range(1, groups + 1) if groups % mine == 0 and mine * each <= WIDEST] or [1]
    whole = [mine for mine in fitting if mine * each % VECTOR == 0] or fitting[-1:]
    return max((mine for mine in whole if n * (groups // mine) >= PROGRAMS), default=whole[0])


@triton.jit
def _of_groups(values, EACH: tl.constexpr, LANES: tl.constexpr, GROUP_LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each channel (LANES,) the sum of the values of its group."""
    member = (tl.arange(0, LANES) // EACH)[:, None] == tl.arange(0, GROUP_LANES)[None, :]
    sums = tl.sum(tl.where(member, values[:, None], 0.0), 0)
    return tl.sum(tl.where(member, sums[None, :], 0.0), 1)


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
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
    means = tl.zeros((ROWS, LANES), tl.float32)  # by place in a block: threads join theirs once, at the end
    squares = tl.zeros((ROWS, LANES), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        exist = (block * ROWS + row < pixels)[:, None] & mine[None, :]
        value = tl.load(x + (block * ROWS + row)[:, None] * c + lane[None, :], exist, 0.0).to(tl.float32)
        means, squares = one_more(means, squares, value, exist, block)
    counts = tl.minimum(tl.maximum(pixels - row + ROWS - 1, 0) // ROWS, BLOCKS)
    lane_means, lane_squares = over_places(means, squares, counts.to(tl.float32), pixels)
    more = tl.zeros((LANES,), tl.float32)
    if ADDED:
        more = tl.load(added + n * added_stride + channel, mine, 0.0).to(tl.float32)
        lane_means += more
    mean = _of_groups(lane_means, EACH, LANES, GROUP_LANES) / EACH
    away = lane_means - mean
    variance = _of_groups(lane_squares + pixels * away * away, EACH, LANES, GROUP_LANES) / (pixels * EACH)
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
        exist = (block * ROWS + row < pixels)[:, None] & mine[None, :]
        places = (block * ROWS + row)[:, None] * c + lane[None, :]
        value = tl.load(x + places, exist, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(result + places, value.to(result.dtype.element_ty), exist)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    gradient, x, around, result, weight, scales, shifts, inverses, offsets, pixels, c,
    AROUND: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, GROUP_LANES: tl.constexpr,
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
        exist = (block * ROWS + row < pixels)[:, None] & mine[None, :]
        places = begin + (block * ROWS + row)[:, None] * c + lane[None, :]
        value = tl.load(x + places, exist, 0.0).to(tl.float32)
        outer = tl.load(gradient + places, exist, 0.0).to(tl.float32)
        inner = before_silu(outer, value, scale[None, :], shift[None, :])
        first += inner
        second += inner * (value + o[None, :])
    w = tl.load(weight + channel, mine, 0.0).to(tl.float32)
    mean = _of_groups(w * tl.sum(first, 0), EACH, LANES, GROUP_LANES) / (pixels * EACH)
    along = _of_groups(w * r * tl.sum(second, 0), EACH, LANES, GROUP_LANES) / (pixels * EACH)
    by_x = -r * r * along
    constant = by_x * o - r * mean
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        exist = (block * ROWS + row < pixels)[:, None] & mine[None, :]
        places = begin + (block * ROWS + row)[:, None] * c + lane[None, :]
        value = tl.load(x + places, exist, 0.0).to(tl.float32)
        outer = tl.load(gradient + places, exist, 0.0).to(tl.float32)
        inner = before_silu(outer, value, scale[None, :], shift[None, :])
        out = inner * scale[None, :] + value * by_x[None, :] + constant[None, :]
        if AROUND:
            out += tl.load(around + places, exist, 0.0).to(tl.float32)
        tl.store(result + places, out.to(result.dtype.element_ty), exist)
