"""The Triton kernel of `group_norm`: a program for some groups of one sample, which fit into its cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # as a target: two for each processor of a large GPU
WIDEST = 256  # channels of a program
VECTOR = 8  # channels that are read at once, where a program's groups begin and end with them
VALUES = 8192  # of a block
STAGES = 3  # blocks that memory is asked for ahead
WARPS = 8


def launch(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """See `group_norm`; x is channels last."""
    n, c, height, width = x.shape
    pixels, each = height * width, c // groups
    mine = groups_of_a_program(n, groups, each)
    lanes = triton.next_power_of_2(mine * each)
    rows = min(triton.next_power_of_2(pixels), max(1, VALUES // lanes))
    result = torch.empty_like(x)
    _normalise[(groups // mine, n)](
        *(x, weight if added is None else added, result, weight, bias),
        *(pixels, c, 0 if added is None else added.stride(0), eps),
        ADDED=added is not None, SILU=silu, GROUPS=mine, EACH=each, GROUP_LANES=triton.next_power_of_2(mine),
        LANES=lanes, ROWS=rows, BLOCKS=triton.cdiv(pixels, rows), STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return result


def groups_of_a_program(n: int, groups: int, each: int) -> int:
    """As many as leave enough programs for the GPU; fewer only where whole vectors are read."""
    fitting = [mine for mine in range(1, groups + 1) if groups % mine == 0 and mine * each <= WIDEST] or [1]
    whole = [mine for mine in fitting if mine * each % VECTOR == 0] or fitting[-1:]
    return max((mine for mine in whole if n * (groups // mine) >= PROGRAMS), default=whole[0])


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    x, added, result, weight, bias, pixels, c, added_stride, eps,
    ADDED: tl.constexpr, SILU: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, GROUP_LANES: tl.constexpr,
    LANES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    lane, row = tl.arange(0, LANES), tl.arange(0, ROWS)
    mine = lane < GROUPS * EACH
    channel = tl.program_id(0) * (GROUPS * EACH) + lane
    x += n * pixels * c + tl.program_id(0) * (GROUPS * EACH)
    result += n * pixels * c + tl.program_id(0) * (GROUPS * EACH)
    first = tl.zeros((ROWS, LANES), tl.float32)  # by place in a block: threads add theirs up once, at the end
    second = tl.zeros((ROWS, LANES), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        start = block * ROWS
        exist = (start + row < pixels)[:, None] & mine[None, :]
        value = tl.load(x + (start + row)[:, None] * c + lane[None, :], exist, 0.0).to(tl.float32)
        first += value
        second += value * value
    sums, squares = tl.sum(first, 0), tl.sum(second, 0)
    more = tl.zeros((LANES,), tl.float32)
    if ADDED:
        more = tl.load(added + n * added_stride + channel, mine, 0.0).to(tl.float32)
        squares += more * (2 * sums + pixels * more)
        sums += pixels * more
    member = (lane // EACH)[:, None] == tl.arange(0, GROUP_LANES)[None, :]
    count = pixels * EACH
    mean = tl.sum(tl.where(member, sums[:, None], 0.0), 0) / count
    variance = tl.sum(tl.where(member, squares[:, None], 0.0), 0) / count - mean * mean
    inverse = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    scale = tl.sum(tl.where(member, inverse[None, :], 0.0), 1) * tl.load(weight + channel, mine, 0.0).to(tl.float32)
    offset = more - tl.sum(tl.where(member, mean[None, :], 0.0), 1)
    shift = tl.load(bias + channel, mine, 0.0).to(tl.float32) + offset * scale
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        start = block * ROWS
        exist = (start + row < pixels)[:, None] & mine[None, :]
        places = (start + row)[:, None] * c + lane[None, :]
        value = tl.load(x + places, exist, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(result + places, value.to(result.dtype.element_ty), exist)
