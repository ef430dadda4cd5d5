"""Score distillation (Poole et al. 2022, https://arxiv.org/abs/2209.14988): what the guidances share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Noise levels are kept inside this share of the schedule: at its ends a model says nothing of use.
MIN_LEVEL, MAX_LEVEL = 0.02, 0.98


def timesteps(levels: Tensor, count: int) -> Tensor:
    """The steps (S,) of a schedule of `count` that stand for noise levels in 0..1, rounded as DreamGaussian does."""
    return (levels.double() * count).round().clamp(int(MIN_LEVEL * count), int(MAX_LEVEL * count)).long()


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise (S * shape[0], *shape[1:]) of which each scene draws its part from its own generator."""
    return torch.cat([torch.randn(shape, generator=g, device=g.device) for g in generators]).to(device)


def distil(
    images: Tensor, encode: Callable[[Tensor], Tensor], direction: Callable[[Tensor], Tensor], scenes: int
) -> tuple[Tensor, Tensor]:
    """Losses (S,), and their gradient by `images` (S * views, 3, H, W).

    Their gradient by the latents that `encode` makes of the images is `direction` of the latents; what is not a number
    in it counts as 0. Nothing in here waits for the device, and no graph is left: it can be captured.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        latents = encode(images)
    with torch.no_grad():
        wanted = torch.nan_to_num(direction(latents.detach()))
        losses = 0.5 * wanted.float().square().reshape(scenes, -1).sum(1)
    (gradient,) = torch.autograd.grad(latents, images, wanted.to(latents))
    return losses, gradient


def with_gradient(images: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
    """`losses` (S,) as a function of `images` (S * views, 3, H, W), whose `gradient` is known."""
    result: Tensor = _Known.apply(images, losses, gradient)
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        factors = outward[0].repeat_interleave(len(gradient) // len(outward[0]))
        return gradient * factors.view(-1, 1, 1, 1), None, None
