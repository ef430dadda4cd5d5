"""DreamGaussian's first stage (Tang et al. 2023, https://arxiv.org/abs/2309.16653) for many scenes at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.accelerate.pinned import copy_async
from generation.generators.base import CutoutFrame, Parts, RemoveBackground, Subject
from generation.generators.dreamgaussian.adam import step_together
from generation.generators.dreamgaussian.carve import carve
from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from generation.generators.dreamgaussian.guidance.zero123 import Zero123
from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.dreamgaussian.plan import Plan, draw_plan
from generation.generators.dreamgaussian.scene import Scene, Views, advance
from generation.splats.cameras import Cameras, orbit
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import rasterize_scenes

COLOUR_WEIGHT, MASK_WEIGHT = 10_000.0, 1_000.0  # DreamGaussian's, of the known view
HARMONICS_RATE = 1 / 20  # of the colour's learning rate, as in 3DGS (Kerbl et al. 2023)
BALL_RADIUS = 0.5
GREY = (0.5, 0.5, 0.5)  # behind sampled views, where the options name no colour
# The views that a carved start is made from: two rings of four, degrees above the object and of azimuth.
RINGS = ((5.0, 0.0), (20.0, 45.0))
SAMPLE_GUIDANCE = 3.0
ZERO123_GUIDANCE = 5.0  # DreamGaussian's; its configs name the scale of MVDream's guidance alone

BORDER = 0.2  # of the known view, which upstream's rasteriser and configs are made for


class SceneStart(NamedTuple):
    """The start of a scene, as far as it does not depend on the picture. Used once: its generator is handed on."""

    generator: torch.Generator
    condition: Tensor | None  # of the text guidance
    ball: tuple[Gaussians, Plan] | None = None  # if the scene starts from a random ball


def load(options: DreamGaussianOptions, parts: Parts) -> DreamGaussian:
    """Build DreamGaussian with the guidances that the options need. Raises WeightsError."""
    text: MVDream | None = None
    image: Zero123 | None = None
    if "mvdream" in options.checkpoints:
        text = parts.load("mvdream", MVDream.from_checkpoint)
    if "zero123" in options.checkpoints:
        image = parts.load("zero123", Zero123.from_checkpoint)
    if "stable_zero123" in options.checkpoints:
        image = parts.load("stable_zero123", Zero123.from_stable_checkpoint)
    return DreamGaussian(text, options, parts.device, parts.remove_background, image)


class DreamGaussian:
    """Optimises scenes together. A ``generation.generators.base.Generator`` whose works are ``Scene``s."""

    name = "dreamgaussian"

    def __init__(
        self,
        guidance: MVDream | None,
        options: DreamGaussianOptions,
        device: str | torch.device,
        remove_background: RemoveBackground,
        image_guidance: Zero123 | None = None,
    ) -> None:
        self._guidance = guidance
        self._image_guidance = image_guidance
        self._views = guidance.views if guidance else 1  # per random camera draw
        self._options = options
        self._device = torch.device(device)
        self._remove_background = remove_background
        self.cutout = CutoutFrame(options.ref_size, BORDER)

    def picture_prompt(self, words: str) -> str:
        return self._options.picture_prompt(words)

    def warm_up(self, most: int, progress: Callable[[str], None]) -> None:
        o = self._options
        if self._guidance and o.lambda_sd > 0:
            self._guidance.warm_up(most * o.batch_size, o.guidance_scale, progress)
        if self._image_guidance:
            self._image_guidance.warm_up(most * o.batch_size * self._views, ZERO123_GUIDANCE, progress)

    def offload(self) -> None:
        for guidance in (self._guidance, self._image_guidance):
            if guidance is not None:
                guidance.offload()

    def onload(self) -> None:
        for guidance in (self._guidance, self._image_guidance):
            if guidance is not None:
                guidance.onload()

    def encode(self, texts: Sequence[str]) -> None:
        if self._guidance:
            o = self._options
            self._guidance.encode([*map(o.mvdream_prompt, texts), o.negative_prompt])

    def truncation(self, words: str) -> dict[str, tuple[int, int]]:
        tokens = self._guidance.truncation(self._options.mvdream_prompt(words)) if self._guidance else None
        return {"mvdream": tokens} if tokens else {}

    def prefetch(self, words: str, seed: int) -> SceneStart:
        o = self._options
        generator = torch.Generator().manual_seed(seed)
        condition = None
        # An image prompt has no text, but MVDream may still sample views that are consistent with the picture.
        if self._guidance and (words or (o.init == "views" and not self._image_guidance)):
            condition = self._guidance.prepare(o.mvdream_prompt(words), o.negative_prompt)
        if o.init == "views" and condition is not None:
            return SceneStart(generator, condition)
        ball = self._ball(generator)
        return SceneStart(generator, condition, (ball, self._plan(self._reference().viewmats, generator)))

    def begin(self, subject: Subject) -> Scene:
        o = self._options
        generator, condition, ball = subject.prefetched or self.prefetch(subject.words, subject.seed)
        assert subject.cutout is not None
        cutout = subject.cutout.to(self._device)
        colour, alpha = cutout[None, :3], cutout[None, 3:]
        known = Views(colour * alpha, alpha)
        image_condition = None
        if self._image_guidance:
            image_condition = self._image_guidance.prepare(cutout, -o.elevation)
        if ball is not None:
            gaussians, plan = ball
        else:
            assert condition is not None
            # Without a text the picture is the only condition.
            images, alphas, around = self._sample(condition, generator, reference=None if subject.words else cutout)
            extent = o.radius * math.tan(math.radians(o.fovy) / 2)
            carved = carve(images, alphas, around, extent, o.num_pts, generator)
            gaussians = self._ball(generator) if carved is None else self._with_harmonics(carved)
            sampled = Views(images * alphas, alphas).at(o.ref_size)
            known = Views(
                torch.cat([known.premultiplied, sampled.premultiplied]), torch.cat([known.alpha, sampled.alpha])
            )
            plan = self._plan(torch.cat([self._reference().viewmats, around.viewmats.cpu()]), generator)
        # Without a text there is no text guidance: at its scale the prompt "" would dominate.
        return Scene(gaussians, known, plan, condition if subject.words else None, image_condition, o, generator)

    def _reference(self) -> Cameras:
        o = self._options
        return orbit(-o.elevation, 0.0, o.radius, o.fovy, o.ref_size, o.ref_size)

    def _plan(self, viewmats: Tensor, generator: torch.Generator) -> Plan:
        return draw_plan(self._options, viewmats, self._views, generator, self._device)

    def _with_harmonics(self, gaussians: Gaussians) -> Gaussians:
        """Add zero coefficients up to the options' degree of spherical harmonics."""
        if degree := self._options.sh_degree:
            rest = gaussians.sh.new_zeros(len(gaussians), (degree + 1) ** 2 - 1, 3)
            gaussians.sh = torch.cat([gaussians.sh, rest], 1)
        return gaussians

    def tick(self, works: Sequence[Scene]) -> None:
        """One iteration of every scene, with one call of the guidance for all of them."""
        scenes = list(works)
        render = cache(lambda: _render(scenes))
        losses = self._scores(scenes, render)  # first: it keeps the GPU busy while the rest is launched
        shown, gradients = _known_views_gradients(scenes, render())
        torch.autograd.backward([*losses, *shown], [*(torch.ones_like(loss) for loss in losses), *gradients])
        with_harmonics = scenes if self._options.sh_degree else []
        before = [scene.harmonics().clone() for scene in with_harmonics]
        step_together([scene.optimiser() for scene in scenes])
        for scene, old in zip(with_harmonics, before, strict=True):
            scene.harmonics().lerp_(old, 1 - HARMONICS_RATE)  # Adam's step is proportional to its learning rate
        advance(scenes, [seen.density_gradients() for seen in render()])

    def _scores(self, scenes: list[Scene], render: Callable[[], list[_Render]]) -> list[Tensor]:
        """The weighted loss of each guidance, in one call for all scenes that have its condition."""
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
                lambda known=known: _together([render()[i].novel for i in known]).clamp(0, 1),  # type: ignore[misc]
                torch.cat([scenes[i].plan.poses[scenes[i].iteration] for i in known]),
                torch.stack([known[i] for i in each]),
                torch.stack([scenes[i].plan.noise_levels[scenes[i].iteration] for i in each]),
                [scenes[i].noise for i in each],
                scale,
            )
            losses.append(weight * score.sum())
        return losses

    def _sample(
        self, condition: Tensor, generator: torch.Generator, reference: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Cameras]:
        """Views (V, 3, S, S) sampled by the text guidance, their alphas (V, 1, S, S) and cameras.

        With `reference` (4, H, W) the first view shows this cut-out, and the others are consistent with it.
        """
        o = self._options
        behind = torch.tensor(GREY if o.background == "random" else o.background, device=self._device)
        # The reference view belongs to the upper ring. Carved from that ring alone, undersides would come to a point.
        rings = RINGS if reference is None else ((-o.elevation, RINGS[0][1]), (RINGS[0][0], RINGS[1][1]))
        elevation = torch.tensor([e for e, _ in rings]).repeat_interleave(4)
        azimuth = torch.cat([start + torch.tensor([0.0, 90, 180, 270]) for _, start in rings])
        assert self._guidance is not None  # a config that samples views has it
        size = self._guidance.image_size
        first = None
        if reference is not None:
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
        return foreground(images, alpha, behind.view(3, 1, 1)), alpha, cameras

    def _ball(self, generator: torch.Generator) -> Gaussians:
        """DreamGaussian's start: `num_pts` nearly transparent grey Gaussians, uniform in a ball."""
        n, device = self._options.num_pts, self._device
        direction = F.normalize(torch.randn(n, 3, generator=generator), dim=1)
        means = direction * BALL_RADIUS * torch.rand(n, 1, generator=generator) ** (1 / 3)
        colours = torch.rand(n, 3, generator=generator) / 255
        spacing = BALL_RADIUS * (4 * math.pi / 3 / n) ** (1 / 3)
        ball = Gaussians(
            means=copy_async(means, device),
            quats=F.pad(torch.ones(n, 1, device=device), (0, 3)),
            log_scales=torch.full((n, 3), math.log(spacing), device=device),
            logit_opacities=torch.full((n,), math.log(0.1 / 0.9), device=device),
            sh=copy_async((colours / SH_C0)[:, None], device),
        )
        return self._with_harmonics(ball)


def _render(scenes: list[Scene]) -> list[_Render]:
    """Render each scene's views of this iteration. Scenes with equal shapes share one call."""
    forms: dict[tuple[int, ...], list[Scene]] = defaultdict(list)
    for scene in scenes:
        forms[scene.plan.sizes[scene.iteration], scene.plan.viewmats.shape[1], scene.gaussians().sh.shape[1]].append(
            scene
        )
    renders = {}
    for (size, *_), alike in forms.items():
        asked = [(s.gaussians(), s.plan.cameras(s.iteration), s.plan.backgrounds[s.iteration]) for s in alike]
        for scene, result in zip(alike, rasterize_scenes(asked, size, size), strict=True):
            renders[scene] = _Render(scene, *result)
    return [renders[scene] for scene in scenes]


class _Render:
    """A scene's renders of this iteration, from all views. Colours have no upper limit."""

    def __init__(self, scene: Scene, rgb: Tensor, alpha: Tensor, info: dict[str, Any]) -> None:
        plan, i = scene.plan, scene.iteration
        info["means2d"].retain_grad()
        known, novel = plan.known.shape[1], plan.poses.shape[1]
        colours, self.novel = rgb.permute(0, 3, 1, 2).split([known, novel])  # each (V, 3, S, S)
        self.known = Views(colours, alpha.permute(0, 3, 1, 2)[:known])
        self.background = plan.backgrounds[i, :1]  # (1, 3) of the known views
        self._first_novel = known
        self._means2d, self._own, self._radii = info["means2d"], info["own"], info["radii"]

    def density_gradients(self) -> tuple[Tensor | None, Tensor]:
        """The loss's gradient by the projected centres in the novel views (V, N, 2), and their radii (V, N)."""
        grad = self._means2d.grad
        return None if grad is None else grad[self._own][self._first_novel :], self._radii[self._first_novel :]


def _known_views_gradients(scenes: list[Scene], renders: list[_Render]) -> tuple[list[Tensor], list[Tensor]]:
    """Renders of the known views, and the gradients of their losses by these renders.

    The losses are mean squared errors of colours and alphas, times `COLOUR_WEIGHT`, `MASK_WEIGHT` and the views' own
    weights. Their values are not computed, and views of one size are batched: otherwise there would be many kernels,
    each too small to keep a GPU busy.
    """
    groups: dict[tuple[int, int], list[tuple[_Render, Views, Tensor]]] = defaultdict(list)
    for scene, render in zip(scenes, renders, strict=True):
        wanted, weights = scene.known_views()
        groups[wanted.alpha.shape[-1], render.known.alpha.shape[-1]].append((render, wanted, weights))
    tensors, gradients = [], []
    for (size, _), group in groups.items():
        shown = _joined([render.known for render, _, _ in group])
        shown = Views(shown.premultiplied.clamp(0, 1), shown.alpha).at(size)
        wanted = _joined([views for _, views, _ in group])
        weights = torch.cat([weights for _, _, weights in group]).view(-1, 1, 1, 1) * (2 / size**2)
        behind = torch.cat([render.background.expand(len(views.alpha), 3) for render, views, _ in group])
        with torch.no_grad():
            colour = torch.addcmul(wanted.premultiplied, 1 - wanted.alpha, behind[:, :, None, None])
            gradients += [
                (shown.premultiplied - colour) * (COLOUR_WEIGHT / 3 * weights),  # a mean over three channels
                (shown.alpha - wanted.alpha) * (MASK_WEIGHT * weights),
            ]
        tensors += [shown.premultiplied, shown.alpha]
    return tensors, gradients


def _joined(views: list[Views]) -> Views:
    return Views(_together([v.premultiplied for v in views]), _together([v.alpha for v in views]))


def _together(tensors: list[Tensor]) -> Tensor:
    """Concatenated; a single tensor is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def foreground(images: Tensor, alphas: Tensor, backdrop: Tensor) -> Tensor:
    """The object's colours (V, 3, S, S), without the backdrop that is mixed into pixels on its outline.

    Inside the object they are those of `images`. On the outline they are taken from nearby inside pixels, because
    alphas are not exact. In thin parts without inside pixels the backdrop's share is subtracted.
    """
    inside = (-F.max_pool2d(-alphas, 3, 1, 1) > 0.9).float()
    colours = ((images - (1 - alphas) * backdrop) / alphas.clamp_min(0.1)).clamp(0, 1)
    near = F.avg_pool2d(inside, 5, 1, 2)
    spread = F.avg_pool2d(images * inside, 5, 1, 2) / near.clamp_min(1e-6)
    colours = torch.where(near > 0, spread, colours)
    return torch.where(inside > 0, images, colours)
