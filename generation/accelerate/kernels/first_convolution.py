"""The 3x3 convolution that an autoencoder begins with, of an image of few channels, there and back.

What comes out is the largest tensor that there is. There, it is written once, and the sums for its normalisation are
taken meanwhile. Back, a convolution with so few outputs would read it nine times and leave most of a GPU's multipliers
idle: it is read once, by one product with all taps, and the nine products of each pixel are added up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from generation.accelerate.kernels.normalise import (
    Norm,
    Statistics,
    finish_statistics,
    new_statistics,
    one_more,
    store_moments,
    sums_over,
)

REGISTERS = 128  # of a thread, there: with more, not all of the programs would run at once
PIXELS = 256  # of a program, back
ALIGNED = 8  # columns are a multiple of it, or products need slower kernels


def columns_of(weight: Tensor) -> Tensor:
    """Weights (O, C, 3, 3) as a matrix (O, 9 C and some zeros)."""
    columns = weight.permute(0, 2, 3, 1).flatten(1)
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % ALIGNED)).contiguous()


def convolve(image: Tensor, columns: Tensor, norm: Norm, added: Tensor) -> tuple[Tensor, Statistics]:
    """The convolution (N, O, H, W), channels last, with padding 1 of the image (N, C, H, W) turned by 180 degrees, and
    the statistics of it + `added` (O,)."""
    n, channels, height, width = image.shape
    outputs, row = columns.shape
    result = image.new_empty(n, height, width, outputs).permute(0, 3, 1, 2)
    sums, statistics = sums_over(result, norm.groups), new_statistics(result)
    _convolve[sums.grid](
        *(image.contiguous(), columns, result, *sums.places, norm.weight, norm.bias, added, *statistics),
        *(height, width, outputs, row, norm.groups, norm.eps),
        CHANNELS_IN=channels, ROW=triton.next_power_of_2(9 * channels), maxnreg=REGISTERS, **sums.sizes,
    )  # fmt: skip
    return result, statistics


def gradient_by_image(gradient: Tensor, columns: Tensor, channels: int) -> Tensor:
    """By the image (N, C, H, W), where `gradient` (N, O, H, W), channels last, is by what `convolve` makes of it."""
    n, outputs, height, width = gradient.shape
    products = gradient.permute(0, 2, 3, 1).reshape(-1, outputs) @ columns
    result = gradient.new_empty(n, channels, height, width)
    grid = (triton.cdiv(height * width, PIXELS), channels, n)
    _add_up[grid](products, result, height, width, columns.shape[1], CHANNELS=channels, PIXELS=PIXELS)
    return result


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    image, columns, result, partial, counters, weight, bias, added, scale, shift, inverse, offset,
    height, width, c, columns_row, groups, eps,
    CHANNELS_IN: tl.constexpr, ROW: tl.constexpr, BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr, EACH: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(2).to(tl.int64)
    pixels = height * width
    image += n * CHANNELS_IN * pixels
    result += n * pixels * c
    partial += n * CHUNKS * 2 * c
    output, place = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, ROW)
    known = place < 9 * CHANNELS_IN
    matrix = tl.load(
        columns + output[None, :] * columns_row + place[:, None], known[:, None] & (output < c)[None, :], 0.0
    )
    tap, channel = place // CHANNELS_IN, place % CHANNELS_IN
    mean = tl.zeros((PIXELS, CHANNELS), tl.float32)
    squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for block in range(BLOCKS):
        pixel = (tl.program_id(0) * BLOCKS + block) * PIXELS + tl.arange(0, PIXELS)
        exist = pixel < pixels
        y = (pixel // width)[:, None] + (tap // 3)[None, :] - 1
        x = (pixel % width)[:, None] + (tap % 3)[None, :] - 1
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & exist[:, None] & known[None, :]
        turned = channel[None, :] * pixels + (height - 1 - y) * width + width - 1 - x
        total = tl.dot(tl.load(image + turned, inside, 0.0), matrix, input_precision="ieee")
        stored = total.to(result.dtype.element_ty)
        tl.store(result + pixel[:, None] * c + output[None, :], stored, exist[:, None] & (output < c)[None, :])
        mean, squares = one_more(mean, squares, stored.to(tl.float32), exist[:, None], block)  # as it will be read
    store_moments(partial, mean, squares, pixels, c, BLOCKS, PIXELS, CHANNELS)
    finish_statistics(
        partial, counters, weight, bias, added, scale, shift, inverse, offset,
        pixels, c, groups, eps, True, BLOCKS, PIXELS, GROUPS, EACH, CHUNKS, AT_ONCE,
    )  # fmt: skip


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]
    products, result, height, width, each, CHANNELS: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """Each pixel of the turned image went into nine outputs."""
    n, channel = tl.program_id(2).to(tl.int64), tl.program_id(1)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row, column = pixel // width, pixel % width
    products += n * height * width * each
    total = tl.zeros((PIXELS,), tl.float32)
    for tap in tl.static_range(9):
        r, c = row + 1 - tap // 3, column + 1 - tap % 3
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        total += tl.load(products + (r * width + c) * each + tap * CHANNELS + channel, inside, 0.0).to(tl.float32)
    at = result + (n * CHANNELS + channel) * height * width + height * width - 1 - pixel
    tl.store(at, total.to(result.dtype.element_ty), pixel < height * width)
