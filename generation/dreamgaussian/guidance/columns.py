"""The way back of a 3x3 convolution that has few channels on its input's side, as one product and a Triton kernel.

A convolution with so few outputs leaves most of a GPU's multipliers idle, and reads its input, here the largest tensor
there is, nine times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 256  # of a program
TAPS = 9
ALIGNED = 8  # columns are a multiple of it, or products need slower kernels


def columns_of(weight: Tensor) -> Tensor:
    """What outputs (..., O) are multiplied by: of weights (O, C, 3, 3) the columns (O, 9 C and some of zeros)."""
    columns = weight.permute(0, 2, 3, 1).flatten(1)
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % ALIGNED)).contiguous()


def gradient_by_image(gradient: Tensor, columns: Tensor, channels: int) -> Tensor:
    """By the image (N, C, H, W) of which, turned by 180 degrees, the convolution with padding 1 has `gradient`
    (N, O, H, W), channels last."""
    n, outputs, height, width = gradient.shape
    products = gradient.permute(0, 2, 3, 1).reshape(-1, outputs) @ columns
    result = gradient.new_empty(n, channels, height, width)
    grid = (triton.cdiv(height * width, PIXELS), channels, n)
    _add_up[grid](products, result, height, width, columns.shape[1], CHANNELS=channels, TAPS=TAPS, PIXELS=PIXELS)
    return result


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]
    products, result, height, width, each, CHANNELS: tl.constexpr, TAPS: tl.constexpr, PIXELS: tl.constexpr
):  # fmt: skip
    """Each pixel of the turned image went into nine outputs."""
    n, channel = tl.program_id(2).to(tl.int64), tl.program_id(1)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row, column = pixel // width, pixel % width
    products += n * height * width * each
    total = tl.zeros((PIXELS,), tl.float32)
    for tap in tl.static_range(TAPS):
        r, c = row + 1 - tap // 3, column + 1 - tap % 3
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        total += tl.load(products + (r * width + c) * each + tap * CHANNELS + channel, inside, 0.0).to(tl.float32)
    at = result + (n * CHANNELS + channel) * height * width + height * width - 1 - pixel
    tl.store(at, total.to(result.dtype.element_ty), pixel < height * width)
