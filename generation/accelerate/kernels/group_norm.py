"""Group normalisation with SiLU of channels-last images, forward and backward, in Triton kernels.

With channels last a group is a few neighbouring values of each pixel. A reduction by group would use a quarter of every
memory sector. These kernels reduce by channel, over chunks of the pixels, and read memory in order. The last program of
a sample combines the channels of each group. A pass takes two kernels, which read the image twice and write it once.
The statistics of a sum of two images are computed while the sum is written.

Variances are computed by Welford's method. In float32 the mean of the squares minus the square of the mean is off by
0.04 when the mean is 300 standard deviations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64  # per program: 128 bytes in half precision; divides the widths of the full-size models
PIXELS = 64  # per block of a program
PROGRAMS = 512  # target number of programs that reduce: as many as a large GPU runs at once
MAX_CHUNKS = 64  # per sample: its last program combines them alone
# Values that it combines at a time. With 4096 this step needs more registers than the reduction itself, and fewer
# programs run at once.
FINISHING = 1024
# Blocks that a program prefetches (Triton's num_stages). Half as many where two images are read: more would leave
# registers for fewer programs.
STAGES = 4


class Norm(NamedTuple):
    """Parameters of a group normalisation."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    groups: int
    eps: float


class Statistics(NamedTuple):
    """Per sample and channel (N, C), in float32. x is the image without what was `added` to it."""

    scale: Tensor  # the normalised image is x * scale + shift
    shift: Tensor
    inverse: Tensor  # (x + offset) * inverse has mean 0 and variance 1 in its group
    offset: Tensor


def compute_statistics(x: Tensor, norm: Norm, added: Tensor | None = None) -> Statistics:
    """Statistics of x (N, C, H, W) + `added` (C,) or (N, C). The addition costs no pass of its own."""
    _, c, pixels = _sizes(x)
    sums, statistics = _sums_over(x, norm.groups), new_statistics(x)
    more = norm.bias if added is None else added
    _statistics_kernel[sums.grid](
        *(x, x, norm.bias, x, *sums.places, norm.weight, norm.bias, more),
        *(*statistics, pixels, c, more.stride(0) if more.ndim == 2 else 0, norm.groups, norm.eps),
        SUM=False, ADDED=added is not None, STAGES=STAGES, **sums.sizes,
    )  # fmt: skip
    return statistics


def normalise(x: Tensor, statistics: Statistics, silu: bool = True) -> Tensor:
    """The normalised x (N, C, H, W), with SiLU if asked."""
    n, c, pixels = _sizes(x)
    result = torch.empty_like(x)
    grid = _grid(triton.cdiv(pixels, PIXELS), c, n)
    _normalise_kernel[grid](x, result, statistics.scale, statistics.shift, pixels, c, SILU=silu, **_BLOCK)
    return result


def normalise_backward(
    gradient: Tensor, x: Tensor, statistics: Statistics, norm: Norm, residual: Tensor | None = None
) -> Tensor:
    """The gradient with respect to x, given the `gradient` with respect to `normalise(x, statistics)`.

    `residual` (N, C, H, W) is added: the gradient that reaches x by the residual connection.
    """
    n, c, pixels = _sizes(x)
    sums = _sums_over(x, norm.groups)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    by_x, constant = x.new_empty(2, n, c, dtype=torch.float32)
    _backward_sums_kernel[sums.grid](
        *(gradient, x, *sums.places, norm.weight, *statistics, by_x, constant),
        *(pixels, c, norm.groups), STAGES=STAGES, **sums.sizes,
    )  # fmt: skip
    result = torch.empty_like(x)
    other = x if residual is None else residual.contiguous(memory_format=torch.channels_last)
    _normalise_backward_kernel[_grid(triton.cdiv(pixels, PIXELS), c, n)](
        *(gradient, x, other, result, statistics.scale, statistics.shift, by_x, constant, pixels, c),
        RESIDUAL=residual is not None, **_BLOCK,
    )  # fmt: skip
    return result


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias, of x and y (N, C, H, W) and bias (C,)."""
    n, c, pixels = _sizes(x)
    result = torch.empty_like(x)
    _add_kernel[_grid(triton.cdiv(n * pixels, PIXELS), c, 1)](x, y, bias, result, n * pixels, c, **_BLOCK)
    return result


def add_with_statistics(x: Tensor, y: Tensor, bias: Tensor, norm: Norm) -> tuple[Tensor, Statistics]:
    """`add(x, y, bias)`, and its statistics."""
    _, c, pixels = _sizes(x)
    result, sums, statistics = torch.empty_like(x), _sums_over(x, norm.groups), new_statistics(x)
    _statistics_kernel[sums.grid](
        *(x, y, bias, result, *sums.places, norm.weight, norm.bias, norm.bias),
        *(*statistics, pixels, c, 0, norm.groups, norm.eps),
        SUM=True, ADDED=False, STAGES=STAGES // 2, **sums.sizes,
    )  # fmt: skip
    return result, statistics


class _Sums(NamedTuple):
    """Launch parameters of a kernel whose programs reduce over chunks of each sample's pixels."""

    grid: tuple[int, int, int]  # chunks, blocks of channels, samples
    places: tuple[Tensor, Tensor]  # the partial sums (N, chunks, 2, C), and the counters of finished programs
    sizes: dict[str, int]


def _sums_over(x: Tensor, groups: int) -> _Sums:
    n, c, pixels = _sizes(x)
    chunks, blocks = _chunks(n, c, pixels)
    places = x.new_empty(n, chunks, 2, c, dtype=torch.float32), _counters(x)
    return _Sums(_grid(chunks, c, n), places, {"BLOCKS": blocks, **_finishing(c, groups, chunks), **_BLOCK})


def new_statistics(x: Tensor) -> Statistics:
    """Uninitialised statistics for x (N, C, H, W)."""
    return Statistics(*x.new_empty(4, *x.shape[:2], dtype=torch.float32))


_BLOCK = {"PIXELS": PIXELS, "CHANNELS": CHANNELS}
_COUNTERS: dict[torch.device, Tensor] = {}
_MAX_SAMPLES = 4096


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels, pixels per image. Raises ValueError when x is not channels last or has too many samples."""
    n, c, h, w = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last) or n > _MAX_SAMPLES:
        raise ValueError(f"{tuple(x.shape)} with strides {x.stride()}: expected channels last, {_MAX_SAMPLES} samples")
    return n, c, h * w


def _grid(blocks: int, c: int, n: int) -> tuple[int, int, int]:
    return blocks, triton.cdiv(c, CHANNELS), n


def _chunks(n: int, c: int, pixels: int) -> tuple[int, int]:
    """Number of chunks of a sample's pixels, and number of blocks in each chunk."""
    blocks = triton.cdiv(pixels, PIXELS)
    wanted = triton.cdiv(PROGRAMS, n * triton.cdiv(c, CHANNELS))
    each = triton.cdiv(blocks, min(wanted, MAX_CHUNKS, blocks))
    return triton.cdiv(blocks, each), each


def _counters(x: Tensor) -> Tensor:
    """Finished programs of each sample; zero between kernels. Allocated once: a CUDA graph keeps its address."""
    if x.device not in _COUNTERS:
        _COUNTERS[x.device] = torch.zeros(_MAX_SAMPLES, dtype=torch.int32, device=x.device)
    return _COUNTERS[x.device]


def _finishing(c: int, groups: int, chunks: int) -> dict[str, int]:
    all_groups, each = triton.next_power_of_2(groups), triton.next_power_of_2(c // groups)
    at_once = max(1, FINISHING // (all_groups * each))
    return {
        "GROUPS": all_groups,
        "EACH": each,
        "CHUNKS": chunks,
        "AT_ONCE": min(at_once, triton.next_power_of_2(chunks)),
    }


@triton.jit
def _block(pixel, pixels, c, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of a block of pixels and channels in a sample's memory, their mask, and the channels."""
    rows = pixel + tl.arange(0, PIXELS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (rows < pixels)[:, None] & (channels < c)[None, :]
    return rows[:, None] * c + channels[None, :], mask, channels


@triton.jit
def _is_last_program(counter, programs):  # type: ignore[no-untyped-def]
    """Whether all other programs of the sample have stored their partial results. Then the counter is reset to zero."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _all_channels(c, groups, GROUPS: tl.constexpr, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """All channels by group (G, E), and their mask."""
    group, member = tl.arange(0, GROUPS)[:, None], tl.arange(0, EACH)[None, :]
    return group * (c // groups) + member, (group < groups) & (member < c // groups)


@triton.jit
def _sum_chunks(  # type: ignore[no-untyped-def]
    partial, c, groups, GROUPS: tl.constexpr, EACH: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """All channels by group (G, E), their mask, and both sums of each channel over all chunks."""
    channels, mask = _all_channels(c, groups, GROUPS, EACH)
    which = tl.arange(0, AT_ONCE)[:, None, None]
    first = tl.zeros((GROUPS, EACH), tl.float32)
    second = tl.zeros((GROUPS, EACH), tl.float32)
    for begin in range(0, CHUNKS, AT_ONCE):
        places = partial + (begin + which) * (2 * c) + channels[None]
        here = mask[None] & (begin + which < CHUNKS)
        # Written by other multiprocessors: .cg bypasses this one's L1 cache.
        first += tl.sum(tl.load(places, here, 0.0, cache_modifier=".cg"), 0)
        second += tl.sum(tl.load(places + c, here, 0.0, cache_modifier=".cg"), 0)
    return channels, mask, first, second


@triton.jit
def _store_sums(partial, first, second, c, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store both sums over this program's pixels, by channel."""
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mine = partial + tl.program_id(0) * 2 * c + channels
    tl.store(mine, tl.sum(first, 0), channels < c)
    tl.store(mine + c, tl.sum(second, 0), channels < c)


@triton.jit
def welford_step(mean, squares, value, mask, block):  # type: ignore[no-untyped-def]
    """Welford's update (1962) of the running mean and sum of squared deviations at each place, by one `value`.

    A place that exists in a block exists in all earlier blocks. So the block's number is the count of values so far.
    """
    share = 1.0 / (block + 1)
    delta = tl.where(mask, value - mean, 0.0)
    return mean + delta * share, squares + delta * delta * (1 - share)


@triton.jit
def merge_moments(mean, squares, counts, count):  # type: ignore[no-untyped-def]
    """Mean and sum of squared deviations of all `count` values, by channel (Chan, Golub and LeVeque 1979).

    `mean` and `squares` are those at each place (P, C), `counts` (P,) the number of values at each place.
    """
    total = tl.sum(mean * counts[:, None], 0) / count
    delta = mean - total[None, :]
    return total, tl.sum(squares + delta * delta * counts[:, None], 0)


@triton.jit
def store_moments(  # type: ignore[no-untyped-def]
    partial, mean, squares, pixels, c, BLOCKS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Store mean and sum of squared deviations over this program's pixels, by channel, from those at each place."""
    left = pixels - tl.program_id(0) * (BLOCKS * PIXELS)
    counts = tl.minimum(tl.maximum(left - tl.arange(0, PIXELS) + PIXELS - 1, 0) // PIXELS, BLOCKS)
    total, deviation = merge_moments(mean, squares, counts.to(tl.float32), tl.minimum(left, BLOCKS * PIXELS))
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mine = partial + tl.program_id(0) * 2 * c + channels
    tl.store(mine, total, channels < c)
    tl.store(mine + c, deviation, channels < c)


@triton.jit
def finish_statistics(  # type: ignore[no-untyped-def]
    partial, counters, weight, bias, added, scale, shift, inverse, offset,
    pixels, c, groups, eps,
    ADDED: tl.constexpr, BLOCKS: tl.constexpr, PIXELS: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Compute the sample's statistics in its last program, from the moments that all programs have stored.

    First the means of the groups, then the squared deviations from them.
    """
    n = tl.program_id(2).to(tl.int64)
    if _is_last_program(counters + n, CHUNKS * tl.num_programs(1)):
        at, mask = _all_channels(c, groups, GROUPS, EACH)
        constant = tl.zeros((GROUPS, EACH), tl.float32)
        if ADDED:
            constant = tl.load(added + at, mask, 0.0).to(tl.float32)
        which = tl.arange(0, AT_ONCE)[:, None, None]
        sums = tl.zeros((GROUPS, EACH), tl.float32)
        for begin in range(0, CHUNKS, AT_ONCE):
            counts = tl.minimum(pixels - (begin + which) * (BLOCKS * PIXELS), BLOCKS * PIXELS).to(tl.float32)
            here = mask[None] & (begin + which < CHUNKS)
            places = partial + (begin + which) * (2 * c) + at[None]
            # Written by other multiprocessors: .cg bypasses this one's L1 cache.
            sums += tl.sum(tl.load(places, here, 0.0, cache_modifier=".cg") * counts, 0)
        count = pixels * (c // groups)
        mean = (tl.sum(tl.where(mask, sums + pixels * constant, 0.0), 1) / count)[:, None]
        squares = tl.zeros((GROUPS, EACH), tl.float32)
        for begin in range(0, CHUNKS, AT_ONCE):
            counts = tl.minimum(pixels - (begin + which) * (BLOCKS * PIXELS), BLOCKS * PIXELS).to(tl.float32)
            here = mask[None] & (begin + which < CHUNKS)
            places = partial + (begin + which) * (2 * c) + at[None]
            delta = tl.load(places, here, 0.0, cache_modifier=".cg") + (constant - mean)[None]
            inside = tl.load(places + c, here, 0.0, cache_modifier=".cg")
            squares += tl.sum(tl.where(here, inside + delta * delta * counts, 0.0), 0)
        variance = (tl.sum(squares, 1) / count)[:, None]
        inverse_here = tl.rsqrt(variance + eps) + tl.zeros((GROUPS, EACH), tl.float32)
        offset_here = constant - mean
        scale_here = inverse_here * tl.load(weight + at, mask, 0.0).to(tl.float32)
        shift_here = tl.load(bias + at, mask, 0.0).to(tl.float32) + offset_here * scale_here
        tl.store(scale + n * c + at, scale_here, mask)
        tl.store(shift + n * c + at, shift_here, mask)
        tl.store(inverse + n * c + at, inverse_here, mask)
        tl.store(offset + n * c + at, offset_here, mask)


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    x, y, bias_of_sum, result, partial, counters, weight, bias, added, scale, shift, inverse, offset,
    pixels, c, added_stride, groups, eps,
    SUM: tl.constexpr, ADDED: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Statistics of x. With SUM those of x + y + `bias_of_sum`, which is also stored as the result."""
    n = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * BLOCKS * PIXELS
    x += n * pixels * c
    y += n * pixels * c
    result += n * pixels * c
    partial += n * CHUNKS * 2 * c
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    more = tl.load(bias_of_sum + channels, channels < c, 0.0).to(tl.float32)[None, :]
    mean = tl.zeros((PIXELS, CHANNELS), tl.float32)  # by place in a block: threads merge theirs once, at the end
    squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        places, mask, _ = _block(begin + block * PIXELS, pixels, c, PIXELS, CHANNELS)
        each = tl.load(x + places, mask, 0.0).to(tl.float32)
        if SUM:
            total = each + tl.load(y + places, mask, 0.0).to(tl.float32) + more
            stored = total.to(result.dtype.element_ty)
            tl.store(result + places, stored, mask)
            each = stored.to(tl.float32)  # as it will be read
        mean, squares = welford_step(mean, squares, each, mask, block)
    store_moments(partial, mean, squares, pixels, c, BLOCKS, PIXELS, CHANNELS)
    finish_statistics(
        partial, counters, weight, bias, added + n * added_stride, scale, shift, inverse, offset,
        pixels, c, groups, eps, ADDED, BLOCKS, PIXELS, GROUPS, EACH, CHUNKS, AT_ONCE,
    )  # fmt: skip


@triton.jit
def _normalise_kernel(  # type: ignore[no-untyped-def]
    x, result, scale, shift, pixels, c,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    places, mask, channels = _block(tl.program_id(0) * PIXELS, pixels, c, PIXELS, CHANNELS)
    places += n * pixels * c
    a = tl.load(scale + n * c + channels, channels < c, 0.0)[None, :]
    b = tl.load(shift + n * c + channels, channels < c, 0.0)[None, :]
    z = tl.load(x + places, mask, 0.0).to(tl.float32) * a + b
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(result + places, z.to(result.dtype.element_ty), mask)


@triton.jit
def silu_backward(gradient, x, scale, shift):  # type: ignore[no-untyped-def]
    """The gradient with respect to SiLU's input, x * scale + shift, given that with respect to its output."""
    z = x * scale + shift
    s = tl.sigmoid(z)
    return gradient * s * (1 + z * (1 - s))


@triton.jit
def _backward_sums_kernel(  # type: ignore[no-untyped-def]
    gradient, x, partial, counters, weight, scale, shift, inverse, offset, by_x, constant,
    pixels, c, groups,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * BLOCKS * PIXELS
    x += n * pixels * c
    gradient += n * pixels * c
    partial += n * CHUNKS * 2 * c
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    a = tl.load(scale + n * c + channels, channels < c, 0.0)[None, :]
    b = tl.load(shift + n * c + channels, channels < c, 0.0)[None, :]
    o = tl.load(offset + n * c + channels, channels < c, 0.0)[None, :]
    gradients = tl.zeros((PIXELS, CHANNELS), tl.float32)
    products = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        places, mask, _ = _block(begin + block * PIXELS, pixels, c, PIXELS, CHANNELS)
        value = tl.load(x + places, mask, 0.0).to(tl.float32)
        inner = silu_backward(tl.load(gradient + places, mask, 0.0).to(tl.float32), value, a, b)
        gradients += inner
        products += inner * (value + o)
    _store_sums(partial, gradients, products, c, CHANNELS)
    if _is_last_program(counters + n, CHUNKS * tl.num_programs(1)):
        at, mask, first, second = _sum_chunks(partial, c, groups, GROUPS, EACH, CHUNKS, AT_ONCE)
        w = tl.load(weight + at, mask, 0.0).to(tl.float32)
        r = tl.load(inverse + n * c + at, mask, 0.0)
        around_mean = tl.load(offset + n * c + at, mask, 0.0)
        count = pixels * (c // groups)
        mean = (tl.sum(w * first, 1) / count)[:, None]
        along = (tl.sum(w * r * second, 1) / count)[:, None]  # with the normalised x
        tl.store(by_x + n * c + at, -r * r * along, mask)
        tl.store(constant + n * c + at, -r * mean - r * r * along * around_mean, mask)


@triton.jit
def _normalise_backward_kernel(  # type: ignore[no-untyped-def]
    gradient, x, residual, result, scale, shift, by_x, constant, pixels, c,
    RESIDUAL: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    places, mask, channels = _block(tl.program_id(0) * PIXELS, pixels, c, PIXELS, CHANNELS)
    places += n * pixels * c
    a = tl.load(scale + n * c + channels, channels < c, 0.0)[None, :]
    b = tl.load(shift + n * c + channels, channels < c, 0.0)[None, :]
    k = tl.load(by_x + n * c + channels, channels < c, 0.0)[None, :]
    d = tl.load(constant + n * c + channels, channels < c, 0.0)[None, :]
    value = tl.load(x + places, mask, 0.0).to(tl.float32)
    inner = silu_backward(tl.load(gradient + places, mask, 0.0).to(tl.float32), value, a, b)
    out = inner * a + value * k + d
    if RESIDUAL:
        out += tl.load(residual + places, mask, 0.0).to(tl.float32)
    tl.store(result + places, out.to(result.dtype.element_ty), mask)


@triton.jit
def _add_kernel(  # type: ignore[no-untyped-def]
    x, y, bias, result, pixels, c, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    places, mask, channels = _block(tl.program_id(0).to(tl.int64) * PIXELS, pixels, c, PIXELS, CHANNELS)
    each = tl.load(bias + channels, channels < c, 0.0).to(tl.float32)[None, :]
    total = tl.load(x + places, mask, 0.0).to(tl.float32) + tl.load(y + places, mask, 0.0).to(tl.float32) + each
    tl.store(result + places, total.to(result.dtype.element_ty), mask)
