"""Group normalisation of channels-last images by our kernels, as a PyTorch custom operator: opaque to torch.compile.

Forward only, for UNets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Up to this many pixels of an image the single kernel for small images is faster than the two for large ones.
ONE_KERNEL = 256


@torch.library.custom_op("guidance::group_norm", mutates_args=())
def group_norm(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Group normalisation of x (N, C, H, W) + ``added`` (N, C) or (C,), with SiLU if asked.

    The result is channels last. ``weight`` and ``bias`` are (C,).
    """
    if x.is_cuda:
        return _by_kernels(x, added, (weight, bias, groups, eps), silu)
    shifted = x if added is None else x + added[..., None, None]
    result = F.group_norm(shifted, groups, weight, bias, eps)
    return (F.silu(result) if silu else result).contiguous(memory_format=torch.channels_last)


@group_norm.register_fake
def _(x: Tensor, added: Tensor | None, weight: Tensor, *settings: Any) -> Tensor:
    n, _, height, width = x.shape
    return x.new_empty(n, height, width, len(weight)).permute(0, 3, 1, 2)


def _by_kernels(x: Tensor, added: Tensor | None, norm: tuple[Tensor, Tensor, int, float], silu: bool) -> Tensor:
    # Triton comes with torch for GPUs
    from generation.accelerate.kernels.group_norm import Norm, compute_statistics, normalise
    from generation.accelerate.kernels.small_group_norm import normalise_small

    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape[2] * x.shape[3] <= ONE_KERNEL:
        return normalise_small(x, Norm(*norm), added, silu)
    return normalise(x, compute_statistics(x, Norm(*norm), added), silu)


class FusedGroupNorm(nn.Module):
    """Replaces the ``nn.GroupNorm`` ``plain``, and the SiLU behind it if asked."""

    def __init__(self, plain: nn.GroupNorm, silu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.groups, self.eps = plain.weight, plain.bias, plain.num_groups, plain.eps
        self.silu = silu

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        result: Tensor = group_norm(x, added, self.weight, self.bias, self.groups, self.eps, self.silu)
        return result
