"""Group normalisation of small channels-last images in one kernel, as a PyTorch operator that a compiler leaves whole.

Where no gradient is wanted: a UNet's images, of 32 by 32 pixels at most, of which a program of the GPU can go through
some groups twice without them leaving its cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.library.custom_op("guidance::group_norm", mutates_args=(), device_types="cpu")
def group_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Of x (N, C, H, W), channels last, + `added` (N, C) or (C,); with SiLU after it, if asked."""
    shifted = x if added is None else x + added[..., None, None]
    result = F.group_norm(shifted, groups, weight, bias, eps)
    return (F.silu(result) if silu else result).contiguous(memory_format=torch.channels_last)


@group_norm.register_kernel("cuda")
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    # Triton comes with torch for GPUs
    from generation.dreamgaussian.guidance.group_norm_kernel import normalise_at_once
    from generation.dreamgaussian.guidance.normalise import Norm

    x = x.contiguous(memory_format=torch.channels_last)
    return normalise_at_once(x, Norm(weight, bias, groups, eps), added, silu)


@group_norm.register_fake
def _(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


class SmallGroupNorm(nn.Module):
    """In place of `plain`, followed by SiLU if asked."""

    def __init__(self, plain: nn.GroupNorm, silu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = plain.weight, plain.bias, plain.num_groups, plain.eps
        self.silu = silu

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        result: Tensor = group_norm(x, added, self.weight, self.bias, self.groups, self.eps, self.silu)
        return result
