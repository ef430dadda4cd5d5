"""Group normalisation with SiLU of channels-last images, forward and backward, in Triton kernels.

With channels last the values of a group are a few neighbours in each pixel. A sum by group would read a quarter of
every memory sector. These kernels go by channel instead, over chunks of the pixels, and read memory in order. The last
program of a sample makes the groups' figures of the channels'. Each pass takes two kernels, which read the image twice
and write it once. The statistics of the sum of two images are taken while it is written.

Variances are Welford's. In single precision the mean of the squares less the square of the mean is off by 0.04 where
the mean is 300 deviations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 64  # of a program: 128 bytes in half precision, and a divisor of the widths that full-size models have
PIXELS = 64  # of a program at a time
PROGRAMS = 512  # that take sums, as a target: as many as a large GPU runs at once
MAX_CHUNKS = 64  # of a sample: its last program adds them up alone
# Values that it does so with at a time. With 4096 it needs more registers than the sums do, and fewer programs run at
# once.
FINISHING = 1024
# Blocks that a program has asked memory for while it works on one. Where two images are added, half as many of each, or
# fewer programs than above run at once.
STAGES = 4


class Norm(NamedTuple):
    """Of what is to be normalised."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    groups: int
    eps: float


class Statistics(NamedTuple):
    """Of each sample and channel (N, C), in float32; x is what was measured, without what was `added` to it."""

    scale: Tensor  # the result is x * scale + shift
    shift: Tensor
    inverse: Tensor  # (x + offset) * inverse has mean 0 and variance 1 in its group
    offset: Tensor


def measure(x: Tensor, norm: Norm, added: Tensor | None = None) -> Statistics:
    """The statistics of x (N, C, H, W) + `added` (C,) or (N, C), which so costs no pass of its own."""
    _, c, pixels = _sizes(x)
    sums, statistics = _sums_over(x, norm.groups), new_statistics(x)
    more = norm.bias if added is None else added
    _measure[sums.grid](
        *(x, x, norm.bias, x, *sums.places, norm.weight, norm.bias, more),
        *(*statistics, pixels, c, more.stride(0) if more.ndim == 2 else 0, norm.groups, norm.eps),
        SUM=False, ADDED=added is not None, STAGES=STAGES, **sums.sizes,
    )  # fmt: skip
    return statistics


def normalise(x: Tensor, statistics: Statistics, silu: bool = True) -> Tensor:
    """The normalised x (N, C, H, W), and SiLU of it if asked."""
    n, c, pixels = _sizes(x)
    result = torch.empty_like(x)
    grid = _grid(triton.cdiv(pixels, PIXELS), c, n)
    _normalise[grid](x, result, statistics.scale, statistics.shift, pixels, c, SILU=silu, **_BLOCK)
    return result


def normalise_backward(
    gradient: Tensor, x: Tensor, statistics: Statistics, norm: Norm, around: Tensor | None = None
) -> Tensor:
    """The gradient by x, where `gradient` is that by `normalise(x, statistics)`; plus `around`, that of another way."""
    n, c, pixels = _sizes(x)
    sums = _sums_over(x, norm.groups)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    by_x, constant = x.new_empty(2, n, c, dtype=torch.float32)
    _measure_backward[sums.grid](
        *(gradient, x, *sums.places, norm.weight, *statistics, by_x, constant),
        *(pixels, c, norm.groups), STAGES=STAGES, **sums.sizes,
    )  # fmt: skip
    result = torch.empty_like(x)
    other = x if around is None else around.contiguous(memory_format=torch.channels_last)
    _normalise_backward[_grid(triton.cdiv(pixels, PIXELS), c, n)](
        *(gradient, x, other, result, statistics.scale, statistics.shift, by_x, constant, pixels, c),
        AROUND=around is not None, **_BLOCK,
    )  # fmt: skip
    return result


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias, of x and y (N, C, H, W) and bias (C,)."""
    n, c, pixels = _sizes(x)
    result = torch.empty_like(x)
    _add[_grid(triton.cdiv(n * pixels, PIXELS), c, 1)](x, y, bias, result, n * pixels, c, **_BLOCK)
    return result


def add_and_measure(x: Tensor, y: Tensor, bias: Tensor, norm: Norm) -> tuple[Tensor, Statistics]:
    """x + y + bias as `add` has it, and its statistics."""
    _, c, pixels = _sizes(x)
    result, sums, statistics = torch.empty_like(x), _sums_over(x, norm.groups), new_statistics(x)
    _measure[sums.grid](
        *(x, y, bias, result, *sums.places, norm.weight, norm.bias, norm.bias),
        *(*statistics, pixels, c, 0, norm.groups, norm.eps),
        SUM=True, ADDED=False, STAGES=STAGES // 2, **sums.sizes,
    )  # fmt: skip
    return result, statistics


class _Sums(NamedTuple):
    """How a kernel is launched whose programs take sums over chunks of each sample's pixels."""

    grid: tuple[int, int, int]  # chunks, blocks of channels, samples
    places: tuple[Tensor, Tensor]  # of the sums, and of the count of programs that are done
    sizes: dict[str, int]


def _sums_over(x: Tensor, groups: int) -> _Sums:
    n, c, pixels = _sizes(x)
    chunks, blocks = _chunks(n, c, pixels)
    places = x.new_empty(n, chunks, 2, c, dtype=torch.float32), _counters(x)
    return _Sums(_grid(chunks, c, n), places, {"BLOCKS": blocks, **_finishing(c, groups, chunks), **_BLOCK})


def new_statistics(x: Tensor) -> Statistics:
    """Room for those of x (N, C, H, W)."""
    return Statistics(*x.new_empty(4, *x.shape[:2], dtype=torch.float32))


_BLOCK = {"PIXELS": PIXELS, "CHANNELS": CHANNELS}
_COUNTERS: dict[torch.device, Tensor] = {}
_MAX_SAMPLES = 4096


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Samples, channels and pixels of each. Raises ValueError when x is not laid out as the kernels read it."""
    n, c, h, w = x.shape
    if not x.is_contiguous(memory_format=torch.channels_last) or n > _MAX_SAMPLES:
        raise ValueError(f"{tuple(x.shape)} with strides {x.stride()}: expected channels last, {_MAX_SAMPLES} samples")
    return n, c, h * w


def _grid(blocks: int, c: int, n: int) -> tuple[int, int, int]:
    return blocks, triton.cdiv(c, CHANNELS), n


def _chunks(n: int, c: int, pixels: int) -> tuple[int, int]:
    """How many chunks a sample's pixels are cut into, and how many blocks of pixels are in each."""
    blocks = triton.cdiv(pixels, PIXELS)
    wanted = triton.cdiv(PROGRAMS, n * triton.cdiv(c, CHANNELS))
    each = triton.cdiv(blocks, min(wanted, MAX_CHUNKS, blocks))
    return triton.cdiv(blocks, each), each


def _counters(x: Tensor) -> Tensor:
    """Of the programs of each sample that are done; zero between kernels. Made once: a graph keeps its address."""
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
    """Places of a block of pixels and channels in a sample's memory, which of them exist, and the channels."""
    rows = pixel + tl.arange(0, PIXELS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exist = (rows < pixels)[:, None] & (channels < c)[None, :]
    return rows[:, None] * c + channels[None, :], exist, channels


@triton.jit
def _is_last(counter, programs):  # type: ignore[no-untyped-def]
    """Whether all other programs of the sample have stored what they found; the counter is zero again then."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _all_channels(c, groups, GROUPS: tl.constexpr, EACH: tl.constexpr):  # type: ignore[no-untyped-def]
    """By groups (G, E), and which of them exist."""
    group, member = tl.arange(0, GROUPS)[:, None], tl.arange(0, EACH)[None, :]
    return group * (c // groups) + member, (group < groups) & (member < c // groups)


@triton.jit
def _added_up(  # type: ignore[no-untyped-def]
    partial, c, groups, GROUPS: tl.constexpr, EACH: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """All channels by groups (G, E), which of them exist, and both sums of each over all chunks."""
    channels, exist = _all_channels(c, groups, GROUPS, EACH)
    which = tl.arange(0, AT_ONCE)[:, None, None]
    first = tl.zeros((GROUPS, EACH), tl.float32)
    second = tl.zeros((GROUPS, EACH), tl.float32)
    for begin in range(0, CHUNKS, AT_ONCE):
        places = partial + (begin + which) * (2 * c) + channels[None]
        here = exist[None] & (begin + which < CHUNKS)
        # Other processors wrote them: past this one's own cache.
        first += tl.sum(tl.load(places, here, 0.0, cache_modifier=".cg"), 0)
        second += tl.sum(tl.load(places + c, here, 0.0, cache_modifier=".cg"), 0)
    return channels, exist, first, second


@triton.jit
def _store_sums(partial, first, second, c, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Over this program's pixels, of both, by channel."""
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mine = partial + tl.program_id(0) * 2 * c + channels
    tl.store(mine, tl.sum(first, 0), channels < c)
    tl.store(mine + c, tl.sum(second, 0), channels < c)


@triton.jit
def one_more(mean, squares, value, exist, block):  # type: ignore[no-untyped-def]
    """Welford's step (1962): mean, and squared deviations from it, of the values at each place with one `value` more.

    A place that exists in a block exists in all blocks before. So the block's number says how many values it had.
    """
    share = 1.0 / (block + 1)
    away = tl.where(exist, value - mean, 0.0)
    return mean + away * share, squares + away * away * (1 - share)


@triton.jit
def over_places(mean, squares, counts, count):  # type: ignore[no-untyped-def]
    """By channel, the mean and the squared deviations of all `count` values (Chan, Golub and LeVeque 1979).

    Given are those at each place (P, C), and how many values each place has (P,).
    """
    total = tl.sum(mean * counts[:, None], 0) / count
    away = mean - total[None, :]
    return total, tl.sum(squares + away * away * counts[:, None], 0)


@triton.jit
def store_moments(  # type: ignore[no-untyped-def]
    partial, mean, squares, pixels, c, BLOCKS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Mean and squared deviations over this program's pixels, by channel, of those at each place of its blocks."""
    left = pixels - tl.program_id(0) * (BLOCKS * PIXELS)
    counts = tl.minimum(tl.maximum(left - tl.arange(0, PIXELS) + PIXELS - 1, 0) // PIXELS, BLOCKS)
    total, deviation = over_places(mean, squares, counts.to(tl.float32), tl.minimum(left, BLOCKS * PIXELS))
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
    """The sample's statistics, in the last of its programs, from the moments that all of them have stored.

    First the groups' means, then what all values deviate from them.
    """
    n = tl.program_id(2).to(tl.int64)
    if _is_last(counters + n, CHUNKS * tl.num_programs(1)):
        at, exist = _all_channels(c, groups, GROUPS, EACH)
        constant = tl.zeros((GROUPS, EACH), tl.float32)
        if ADDED:
            constant = tl.load(added + at, exist, 0.0).to(tl.float32)
        which = tl.arange(0, AT_ONCE)[:, None, None]
        sums = tl.zeros((GROUPS, EACH), tl.float32)
        for begin in range(0, CHUNKS, AT_ONCE):
            counts = tl.minimum(pixels - (begin + which) * (BLOCKS * PIXELS), BLOCKS * PIXELS).to(tl.float32)
            here = exist[None] & (begin + which < CHUNKS)
            places = partial + (begin + which) * (2 * c) + at[None]
            # Other processors wrote them: past this one's own cache.
            sums += tl.sum(tl.load(places, here, 0.0, cache_modifier=".cg") * counts, 0)
        count = pixels * (c // groups)
        mean = (tl.sum(tl.where(exist, sums + pixels * constant, 0.0), 1) / count)[:, None]
        squares = tl.zeros((GROUPS, EACH), tl.float32)
        for begin in range(0, CHUNKS, AT_ONCE):
            counts = tl.minimum(pixels - (begin + which) * (BLOCKS * PIXELS), BLOCKS * PIXELS).to(tl.float32)
            here = exist[None] & (begin + which < CHUNKS)
            places = partial + (begin + which) * (2 * c) + at[None]
            away = tl.load(places, here, 0.0, cache_modifier=".cg") + (constant - mean)[None]
            inside = tl.load(places + c, here, 0.0, cache_modifier=".cg")
            squares += tl.sum(tl.where(here, inside + away * away * counts, 0.0), 0)
        variance = (tl.sum(squares, 1) / count)[:, None]
        inverse_here = tl.rsqrt(variance + eps) + tl.zeros((GROUPS, EACH), tl.float32)
        offset_here = constant - mean
        scale_here = inverse_here * tl.load(weight + at, exist, 0.0).to(tl.float32)
        shift_here = tl.load(bias + at, exist, 0.0).to(tl.float32) + offset_here * scale_here
        tl.store(scale + n * c + at, scale_here, exist)
        tl.store(shift + n * c + at, shift_here, exist)
        tl.store(inverse + n * c + at, inverse_here, exist)
        tl.store(offset + n * c + at, offset_here, exist)


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    x, y, bias_of_sum, result, partial, counters, weight, bias, added, scale, shift, inverse, offset,
    pixels, c, added_stride, groups, eps,
    SUM: tl.constexpr, ADDED: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of x, or of x + y + `bias_of_sum`, which becomes the result."""
    n = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * BLOCKS * PIXELS
    x += n * pixels * c
    y += n * pixels * c
    result += n * pixels * c
    partial += n * CHUNKS * 2 * c
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    more = tl.load(bias_of_sum + channels, channels < c, 0.0).to(tl.float32)[None, :]
    mean = tl.zeros((PIXELS, CHANNELS), tl.float32)  # by place in a block: threads join theirs once, at the end
    squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        places, exist, _ = _block(begin + block * PIXELS, pixels, c, PIXELS, CHANNELS)
        each = tl.load(x + places, exist, 0.0).to(tl.float32)
        if SUM:
            total = each + tl.load(y + places, exist, 0.0).to(tl.float32) + more
            stored = total.to(result.dtype.element_ty)
            tl.store(result + places, stored, exist)
            each = stored.to(tl.float32)  # as it will be read
        mean, squares = one_more(mean, squares, each, exist, block)
    store_moments(partial, mean, squares, pixels, c, BLOCKS, PIXELS, CHANNELS)
    finish_statistics(
        partial, counters, weight, bias, added + n * added_stride, scale, shift, inverse, offset,
        pixels, c, groups, eps, ADDED, BLOCKS, PIXELS, GROUPS, EACH, CHUNKS, AT_ONCE,
    )  # fmt: skip


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    x, result, scale, shift, pixels, c,
    SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    places, exist, channels = _block(tl.program_id(0) * PIXELS, pixels, c, PIXELS, CHANNELS)
    places += n * pixels * c
    a = tl.load(scale + n * c + channels, channels < c, 0.0)[None, :]
    b = tl.load(shift + n * c + channels, channels < c, 0.0)[None, :]
    z = tl.load(x + places, exist, 0.0).to(tl.float32) * a + b
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(result + places, z.to(result.dtype.element_ty), exist)


@triton.jit
def before_silu(gradient, x, scale, shift):  # type: ignore[no-untyped-def]
    """The gradient by SiLU's input, x * scale + shift, of that by its output."""
    z = x * scale + shift
    s = tl.sigmoid(z)
    return gradient * s * (1 + z * (1 - s))


@triton.jit
def _measure_backward(  # type: ignore[no-untyped-def]
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
        places, exist, _ = _block(begin + block * PIXELS, pixels, c, PIXELS, CHANNELS)
        value = tl.load(x + places, exist, 0.0).to(tl.float32)
        inner = before_silu(tl.load(gradient + places, exist, 0.0).to(tl.float32), value, a, b)
        gradients += inner
        products += inner * (value + o)
    _store_sums(partial, gradients, products, c, CHANNELS)
    if _is_last(counters + n, CHUNKS * tl.num_programs(1)):
        at, exist, first, second = _added_up(partial, c, groups, GROUPS, EACH, CHUNKS, AT_ONCE)
        w = tl.load(weight + at, exist, 0.0).to(tl.float32)
        r = tl.load(inverse + n * c + at, exist, 0.0)
        around_mean = tl.load(offset + n * c + at, exist, 0.0)
        count = pixels * (c // groups)
        mean = (tl.sum(w * first, 1) / count)[:, None]
        along = (tl.sum(w * r * second, 1) / count)[:, None]  # with the normalised x
        tl.store(by_x + n * c + at, -r * r * along, exist)
        tl.store(constant + n * c + at, -r * mean - r * r * along * around_mean, exist)


@triton.jit
def _normalise_backward(  # type: ignore[no-untyped-def]
    gradient, x, around, result, scale, shift, by_x, constant, pixels, c,
    AROUND: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    places, exist, channels = _block(tl.program_id(0) * PIXELS, pixels, c, PIXELS, CHANNELS)
    places += n * pixels * c
    a = tl.load(scale + n * c + channels, channels < c, 0.0)[None, :]
    b = tl.load(shift + n * c + channels, channels < c, 0.0)[None, :]
    k = tl.load(by_x + n * c + channels, channels < c, 0.0)[None, :]
    d = tl.load(constant + n * c + channels, channels < c, 0.0)[None, :]
    value = tl.load(x + places, exist, 0.0).to(tl.float32)
    inner = before_silu(tl.load(gradient + places, exist, 0.0).to(tl.float32), value, a, b)
    out = inner * a + value * k + d
    if AROUND:
        out += tl.load(around + places, exist, 0.0).to(tl.float32)
    tl.store(result + places, out.to(result.dtype.element_ty), exist)


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    x, y, bias, result, pixels, c, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    places, exist, channels = _block(tl.program_id(0).to(tl.int64) * PIXELS, pixels, c, PIXELS, CHANNELS)
    each = tl.load(bias + channels, channels < c, 0.0).to(tl.float32)[None, :]
    total = tl.load(x + places, exist, 0.0).to(tl.float32) + tl.load(y + places, exist, 0.0).to(tl.float32) + each
    tl.store(result + places, total.to(result.dtype.element_ty), exist)
