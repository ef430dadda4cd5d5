"""DreamGaussian's first stage (Tang et al. 2023, https://arxiv.org/abs/2309.16653) for many scenes at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.dreamgaussian.carve import carve
from generation.dreamgaussian.guidance.base import ImageGuidance, TextGuidance
from generation.dreamgaussian.scene import Scene, View
from generation.dreamgaussian.schedule import noise_level
from generation.settings import DreamGaussianOptions
from generation.splats.cameras import orbit
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import rasterize

COLOUR_WEIGHT, MASK_WEIGHT = 10_000.0, 1_000.0  # DreamGaussian's, of the known view
BALL_RADIUS = 0.5
GREY = (0.5, 0.5, 0.5)  # behind sampled views, where the options name no colour
# The views that a carved start is made from: two rings of four, degrees above the object and of azimuth.
RINGS = ((5.0, 0.0), (20.0, 45.0))
SAMPLED_AT_ONCE = 3  # of the sampled views, in each iteration
SAMPLE_GUIDANCE = 3.0
ZERO123_GUIDANCE = 5.0  # DreamGaussian's; its configs name the scale of MVDream's guidance alone
CARVED_NOISE = 0.5  # a carved start has its coarse shape: the noise that would decide it again is left out

RemoveBackground = Callable[[Tensor], Tensor]


class DreamGaussian:
    """Starts scenes and steps them together."""

    def __init__(
        self,
        guidance: TextGuidance | None,
        options: DreamGaussianOptions,
        device: str | torch.device,
        remove_background: RemoveBackground,
        image_guidance: ImageGuidance | None = None,
    ) -> None:
        self._guidance = guidance
        self._image_guidance = image_guidance
        self._views = guidance.views if guidance else 1  # of one draw of cameras
        self._options = options
        self._device = torch.device(device)
        self._remove_background = remove_background

    def start(self, cutout: Tensor, prompt: str, seed: int) -> Scene:
        """A scene for `cutout` (4, S, S), RGBA in 0..1 at the options' ref_size; the same for the same seed."""
        o = self._options
        generator = torch.Generator().manual_seed(seed)
        cutout = cutout.to(self._device)
        colour, alpha = cutout[None, :3], cutout[None, 3:]
        camera = orbit(-o.elevation, 0.0, o.radius, o.fovy, o.ref_size, o.ref_size)
        reference = View(colour * alpha, alpha, camera.to(self._device))
        condition = image_condition = None
        if self._image_guidance:
            image_condition = self._image_guidance.prepare(cutout, -o.elevation)
        if self._guidance and (prompt or not self._image_guidance):
            condition = self._guidance.prepare(prompt, o.negative_prompt)
        sampled = gaussians = None
        if o.init == "views" and condition is not None:
            # Where there are no words, the picture alone says what to draw.
            images, sampled = self._sample(condition, generator, reference=None if prompt else cutout)
            extent = o.radius * math.tan(math.radians(o.fovy) / 2)
            gaussians = carve(images, sampled.alpha, sampled.cameras, extent, o.num_pts, generator)
        if gaussians is None:
            gaussians = self._ball(generator)
        if o.sh_degree:
            rest = gaussians.sh.new_zeros(len(gaussians), (o.sh_degree + 1) ** 2 - 1, 3)
            gaussians.sh = torch.cat([gaussians.sh, rest], 1)
        return Scene(gaussians, reference, sampled, condition, o, generator, image_condition)

    def step(self, scenes: list[Scene]) -> None:
        """Advance every scene by one iteration, with one call of the guidance for all of them."""
        o = self._options
        losses, renders = [], []
        for scene in scenes:
            scene.iteration += 1
            warm = scene.step_ratio if o.warmup_rgb_loss and scene.sampled is None else 1.0
            # Known views are compared over a grey drawn anew each time, so that only opacity can pass for background.
            grey = float(torch.rand((), generator=scene.generator))
            loss = warm * o.lambda_reference * _view_loss(scene.gaussians(), scene.reference, grey)
            if scene.sampled is not None and o.lambda_views > 0:
                pick = torch.randperm(len(scene.sampled.cameras), generator=scene.generator)[:SAMPLED_AT_ONCE]
                loss = loss + o.lambda_views * _view_loss(scene.gaussians(), scene.sampled, grey, pick)
            losses.append(loss)
            renders.append(self._novel_views(scene))
        losses += self._scores(scenes, renders)
        torch.stack([loss.reshape(()) for loss in losses]).sum().backward()
        for scene, render in zip(scenes, renders, strict=True):
            scene.update(render["means2d"].grad, render["radii"], render["size"], render["size"])

    def _scores(self, scenes: list[Scene], renders: list[dict]) -> list[Tensor]:
        """The weighted loss of each guidance, of the scenes that it has a condition for; one call for all of them."""
        o, losses = self._options, []
        for guidance, weight, scale, conditions in (
            (self._guidance, o.lambda_sd, o.guidance_scale, [s.condition for s in scenes]),
            (self._image_guidance, o.lambda_zero123, ZERO123_GUIDANCE, [s.image_condition for s in scenes]),
        ):
            known = {i: condition for i, condition in enumerate(conditions) if condition is not None}
            if guidance is None or weight == 0 or not known:
                continue
            each = [i for i in known for _ in range(o.batch_size * self._views // guidance.views)]
            score = guidance.loss(
                torch.cat([renders[i]["images"] for i in known]),
                torch.cat([renders[i]["poses"] for i in known]),
                torch.stack([known[i] for i in each]),
                [self._noise_level(scenes[i]) for i in each],
                [scenes[i].generator for i in each],
                scale,
            )
            losses.append(weight * score.sum())
        return losses

    def _noise_level(self, scene: Scene) -> float:
        most = 1.0 if scene.sampled is None else CARVED_NOISE
        if self._options.anneal_timestep:
            return noise_level(scene.step_ratio, most)
        return most * float(torch.rand((), generator=scene.generator))

    def _novel_views(self, scene: Scene) -> dict:
        """Renders of `batch_size` draws of cameras, 90 degrees apart, at a random elevation and azimuth."""
        o = self._options
        size = o.render_size or (128 if scene.step_ratio < 0.3 else 256 if scene.step_ratio < 0.6 else 512)
        above = -o.elevation
        low, high = max(above - o.max_ver, -80.0), min(above - o.min_ver, 80.0)
        draws = torch.rand(o.batch_size, 2, generator=scene.generator)
        elevation = (low + (high - low) * draws[:, 0]).repeat_interleave(self._views)
        around = 90.0 * torch.arange(self._views).repeat(o.batch_size)
        azimuth = (360 * draws[:, 1]).repeat_interleave(self._views) + around
        cameras = orbit(elevation, azimuth, o.radius, o.fovy, size, size).to(self._device)
        if o.background == "random":
            white = float(torch.rand((), generator=scene.generator)) > o.invert_bg_prob
            background = torch.full((3,), float(white), device=self._device)
        else:
            background = torch.tensor(o.background, device=self._device)
        rgb, _, info = rasterize(scene.gaussians(), cameras, size, size, background)
        info["means2d"].retain_grad()
        images = rgb.permute(0, 3, 1, 2).clamp(0, 1)
        poses = cameras.camera_to_world
        return {"images": images, "poses": poses, "size": size, "means2d": info["means2d"], "radii": info["radii"]}

    def _sample(
        self, condition: Tensor, generator: torch.Generator, reference: Tensor | None = None
    ) -> tuple[Tensor, View]:
        """Colours (V, 3, S, S) of what the prompt describes, drawn by the guidance, and their cut-outs.

        With `reference` (4, H, W), the cut-out that the first of them shows, they are drawn to go with it.
        """
        o = self._options
        behind = torch.tensor(GREY if o.background == "random" else o.background, device=self._device)
        elevation = torch.tensor([e for e, _ in RINGS]).repeat_interleave(4)
        azimuth = torch.cat([start + torch.tensor([0.0, 90, 180, 270]) for _, start in RINGS])
        assert self._guidance is not None  # a config that samples views asks for it
        size = self._guidance.image_size
        first = None
        if reference is not None:
            elevation[:4] = -o.elevation
            first = reference[:3] * reference[3:] + behind.view(3, 1, 1) * (1 - reference[3:])
            first = F.interpolate(first[None], size=(size, size), mode="area")[0]
        cameras = orbit(elevation, azimuth, o.radius, o.fovy, size, size).to(self._device)
        images = self._guidance.sample(
            condition,
            cameras.camera_to_world,
            generator,
            o.init_views_steps,
            SAMPLE_GUIDANCE,
            first,
        )
        alpha = self._remove_background(images)
        colour = foreground(images, alpha, behind.view(3, 1, 1))
        return colour, View(colour * alpha, alpha, cameras)

    def _ball(self, generator: torch.Generator) -> Gaussians:
        """DreamGaussian's start: `num_pts` grey points spread evenly by radius in a ball, nearly transparent."""
        n = self._options.num_pts
        direction = F.normalize(torch.randn(n, 3, generator=generator), dim=1)
        means = direction * BALL_RADIUS * torch.rand(n, 1, generator=generator) ** (1 / 3)
        colours = torch.rand(n, 3, generator=generator) / 255
        spacing = BALL_RADIUS * (4 * math.pi / 3 / n) ** (1 / 3)
        gaussians = Gaussians(
            means=means,
            quats=torch.tensor([1.0, 0, 0, 0]).repeat(n, 1),
            log_scales=torch.full((n, 3), math.log(spacing)),
            logit_opacities=torch.full((n,), math.log(0.1 / 0.9)),
            sh=(colours / SH_C0)[:, None],
        )
        return gaussians.to(self._device)


def _view_loss(gaussians: Gaussians, view: View, grey: float, pick: Tensor | None = None) -> Tensor:
    """Colour and mask loss over a grey background against known views; the mean over those picked."""
    colour, alpha, cameras = view.premultiplied, view.alpha, view.cameras
    if pick is not None:
        colour, alpha, cameras = colour[pick], alpha[pick], cameras[pick]
    height, width = colour.shape[-2:]
    rgb, opacity, _ = rasterize(gaussians, cameras, width, height, torch.full((3,), grey, device=colour.device))
    colour_error = F.mse_loss(rgb.permute(0, 3, 1, 2).clamp(0, 1), colour + (1 - alpha) * grey)
    return COLOUR_WEIGHT * colour_error + MASK_WEIGHT * F.mse_loss(opacity.permute(0, 3, 1, 2), alpha)


def foreground(images: Tensor, alphas: Tensor, backdrop: Tensor) -> Tensor:
    """The object's own colours (V, 3, S, S), without the backdrop that pixels on its outline are mixed with.

    Inside they are those of `images`; on the outline those of the nearest inside, for alphas are not right to the last
    digit; and where no inside is near, in thin parts, what is left when the backdrop's share is taken out.
    """
    inside = (-F.max_pool2d(-alphas, 3, 1, 1) > 0.9).float()
    colours = ((images - (1 - alphas) * backdrop) / alphas.clamp_min(0.1)).clamp(0, 1)
    near = F.avg_pool2d(inside, 5, 1, 2)
    spread = F.avg_pool2d(images * inside, 5, 1, 2) / near.clamp_min(1e-6)
    colours = torch.where(near > 0, spread, colours)
    return torch.where(inside > 0, images, colours)
