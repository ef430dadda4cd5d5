"""The cameras, backgrounds and noise levels of a scene's iterations, drawn when the scene begins.

All random numbers but the guidance's noise and the positions of split Gaussians are drawn here at once, and copied to
the device before the first iteration. A copy inside the loop would make the GPU wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from generation.accelerate.pinned import copy_async
from generation.generators.dreamgaussian.options import HIGHEST, DreamGaussianOptions
from generation.generators.dreamgaussian.schedule import noise_level, render_size
from generation.splats.cameras import Cameras, orbit

SAMPLED_AT_ONCE = 3  # sampled views per iteration
CARVED_NOISE = 0.5  # noise levels above would change the coarse shape, which a carved start has already


@dataclass(frozen=True)
class Plan:
    """For each of I iterations: K known views to compare with, then V novel views for the guidance."""

    sizes: list[int]  # (I) pixels of the renders' sides
    viewmats: Tensor  # (I, K + V, 4, 4) world -> camera
    intrinsics: dict[int, Tensor]  # size -> (K + V, 3, 3)
    backgrounds: Tensor  # (I, K + V, 3) behind the renders
    poses: Tensor  # (I, V, 4, 4) of the novel views, OpenGL camera -> world
    known: Tensor  # (I, K) which of the known views
    weights: Tensor  # (I, K) of their losses
    noise_levels: Tensor  # (I,) in 0..1

    def cameras(self, iteration: int) -> Cameras:
        """Of all K + V views."""
        return Cameras(self.viewmats[iteration], self.intrinsics[self.sizes[iteration]])


def draw_plan(
    options: DreamGaussianOptions, known: Tensor, views: int, generator: torch.Generator, device: torch.device
) -> Plan:
    """`known` (1 + n, 4, 4): world -> camera of the reference view and of n sampled ones, which may be none.

    The novel views are `batch_size` draws of `views` cameras, 90 degrees apart, at a random elevation and azimuth.
    """
    o = options
    sampled = len(known) - 1
    ratio = torch.arange(1, o.iters + 1) / o.iters
    draws = torch.rand(o.iters, 3 + 2 * o.batch_size, generator=generator)
    grey, white, level = draws[:, 0], draws[:, 1] > o.invert_bg_prob, draws[:, 2]
    above = -o.elevation
    low, high = max(above - o.max_ver, -HIGHEST), min(above - o.min_ver, HIGHEST)
    elevation = (low + (high - low) * draws[:, 3 : 3 + o.batch_size]).repeat_interleave(views, 1)
    around = 90.0 * torch.arange(views).repeat(o.batch_size)
    azimuth = (360 * draws[:, 3 + o.batch_size :]).repeat_interleave(views, 1) + around
    novel = orbit(elevation.flatten(), azimuth.flatten(), o.radius, o.fovy, 1, 1)
    novel_viewmats = novel.viewmats.view(o.iters, -1, 4, 4)

    compared = torch.zeros(o.iters, 1, dtype=torch.long)
    weights = torch.full((o.iters, 1), o.lambda_reference)
    if o.warmup_rgb_loss and not sampled:
        weights *= ratio[:, None]
    if sampled:
        count = min(SAMPLED_AT_ONCE, sampled) if o.lambda_views > 0 else 0
        pick = torch.rand(o.iters, sampled, generator=generator).argsort(1)[:, :count] + 1
        compared = torch.cat([compared, pick], 1)
        weights = torch.cat([weights, torch.full((o.iters, count), o.lambda_views / max(1, count))], 1)
    # Known views are compared over a random grey, so that Gaussians can not imitate the background.
    behind_known = grey[:, None, None].expand(-1, compared.shape[1], 3)
    behind_novel = white.float()[:, None] if o.background == "random" else torch.tensor(o.background)
    backgrounds = torch.cat(
        [behind_known, behind_novel.expand(o.iters, 3)[:, None].expand(-1, novel_viewmats.shape[1], 3)], 1
    )
    most = CARVED_NOISE if sampled else 1.0
    levels = noise_level(ratio.double(), most) if o.anneal_timestep else most * level.double()
    viewmats = torch.cat([known.cpu()[compared], novel_viewmats], 1)
    sizes = [o.render_size or render_size(float(r)) for r in ratio]
    intrinsics = {s: orbit(0.0, 0.0, o.radius, o.fovy, s, s).Ks.expand(viewmats.shape[1], 3, 3) for s in set(sizes)}
    return Plan(
        sizes=sizes,
        viewmats=copy_async(viewmats, device),
        intrinsics={size: copy_async(K.contiguous(), device) for size, K in intrinsics.items()},
        backgrounds=copy_async(backgrounds.contiguous(), device),
        poses=copy_async(novel.camera_to_world.view(o.iters, -1, 4, 4), device),
        known=copy_async(compared, device),
        weights=copy_async(weights, device),
        noise_levels=copy_async(levels, device),
    )
