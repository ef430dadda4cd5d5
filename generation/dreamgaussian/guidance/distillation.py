"""Score distillation (Poole et al. 2022, https://arxiv.org/abs/2209.14988): what the guidances share."""

from __future__ import annotations

import torch
from torch import Tensor

# Noise levels are kept inside this share of the schedule: at its ends a model says nothing of use.
MIN_LEVEL, MAX_LEVEL = 0.02, 0.98


def timesteps(levels: list[float], count: int) -> list[int]:
    """The steps of a schedule of `count` that stand for noise levels of 0..1, as DreamGaussian rounds them."""
    return [min(max(round(level * count), int(MIN_LEVEL * count)), int(MAX_LEVEL * count)) for level in levels]


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Noise (S * shape[0], *shape[1:]) of which each scene draws its part from its own generator."""
    return torch.cat([torch.randn(shape, generator=g, device=g.device) for g in generators]).to(like)


def distil(latents: Tensor, gradient: Tensor, scenes: int) -> Tensor:
    """A loss (S,) whose gradient by the latents is `gradient`; what is not a number in it counts as 0."""
    target = (latents - torch.nan_to_num(gradient)).detach().float()
    return 0.5 * (latents.float() - target).square().reshape(scenes, -1).sum(1)
