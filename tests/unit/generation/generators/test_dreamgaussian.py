"""DreamGaussian: schedules, the carved start, MVDream's guidance, and scenes that do not disturb each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from generation.accelerate import text_cache
from generation.generators.base import Subject
from generation.generators.dreamgaussian import optimiser
from generation.generators.dreamgaussian.carve import carve
from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from generation.generators.dreamgaussian.guidance.zero123 import Zero123
from generation.generators.dreamgaussian.optimiser import DreamGaussian, foreground
from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.dreamgaussian.scene import Views
from generation.generators.dreamgaussian.schedule import noise_level, position_lr
from generation.generators.multiview.attention import MultiViewAttention, camera_embedding, join_views
from generation.splats.cameras import orbit
from generation.splats.gaussians import SH_C0
from tests.support.tensors import gradient as gradient_of

RADIUS, FOVY = 2.5, 49.1


def test_position_lr_is_log_linear() -> None:
    assert position_lr(0, 1e-3, 1e-5, 300) == pytest.approx(1e-3)
    assert position_lr(150, 1e-3, 1e-5, 300) == pytest.approx(1e-4)
    assert position_lr(900, 1e-3, 1e-5, 300) == pytest.approx(1e-5)


def test_noise_level_falls_to_zero() -> None:
    assert noise_level(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 0.75, 0.0]
    assert noise_level(torch.tensor(0.5), start=0.5) == 0.25


def test_camera_embedding_is_in_blender_axes() -> None:
    front, right = camera_embedding(orbit(0.0, torch.tensor([0.0, 90.0]), RADIUS, FOVY, 8, 8).camera_to_world)
    # y-up front (+z) is Blender's -y; +x stays; the position has length one whatever the radius
    assert torch.allclose(front.view(4, 4)[:3, 3], torch.tensor([0.0, -1.0, 0.0]), atol=1e-6)
    assert torch.allclose(right.view(4, 4)[:3, 3], torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    assert torch.allclose(front.view(4, 4)[:3, 1], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)  # up is z


def test_a_front_elsewhere_is_a_turn_of_the_cameras() -> None:
    azimuth = torch.tensor([0.0, 35.0, 200.0])
    turned, around = (orbit(20.0, a, RADIUS, FOVY, 8, 8).camera_to_world for a in (azimuth, azimuth + 90))
    assert torch.allclose(camera_embedding(turned, front_azimuth=90.0), camera_embedding(around), atol=1e-6)


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(32,),
        attention_head_dim=1, cross_attention_dim=16, norm_num_groups=8, class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
    ).eval()  # fmt: skip


@torch.no_grad()
def test_views_of_a_scene_see_each_other_and_no_other_scene() -> None:
    unet = small_unet()
    joint = join_views(unet, 4)
    assert isinstance(joint, MultiViewAttention)
    x, words, cameras = torch.randn(8, 4, 8, 8), torch.randn(8, 3, 16), torch.randn(8, 16)

    def run(x: torch.Tensor) -> torch.Tensor:
        return unet(x, 500, words, class_labels=cameras).sample

    before, changed = run(x), x.clone()
    changed[1] += 1.0  # one view of the first scene
    moved = (run(changed) - before).abs().amax((1, 2, 3))
    assert (moved[[0, 2, 3]] > 1e-4).all()
    assert (moved[4:] < 1e-5).all()


@torch.no_grad()
def test_text_may_come_once_for_each_scene() -> None:
    unet = small_unet()
    x, words, cameras = torch.randn(8, 4, 8, 8), torch.randn(2, 3, 16), torch.randn(8, 16)
    join_views(unet, 4)
    each = unet(x, 500, words.repeat_interleave(4, 0), class_labels=cameras).sample
    join_views(unet, 4, shared_text=True)
    once = unet(x, 500, words, class_labels=cameras).sample
    assert torch.allclose(once, each, atol=1e-5)


def sphere_views(radius: float = 0.6, size: int = 64):
    """Exact silhouettes of a ball that is red in its upper half and blue in its lower."""
    elevation, azimuth = torch.tensor([10.0] * 4 + [40.0] * 4), torch.arange(8) * 45.0
    cameras = orbit(elevation, azimuth, RADIUS, FOVY, size, size)
    ticks = (torch.arange(size) + 0.5 - size / 2) / cameras.Ks[0, 0, 0]
    v, u = torch.meshgrid(ticks, ticks, indexing="ij")
    rays = torch.nn.functional.normalize(torch.stack([u, v, torch.ones_like(u)], -1), dim=-1)
    world = rays.reshape(1, -1, 3) @ cameras.viewmats[:, :3, :3]  # rows of R^T r
    origin = cameras.positions[:, None]
    b = (world * origin).sum(-1)
    hit = b**2 - (origin**2).sum(-1) + radius**2
    depth = -b - hit.clamp_min(0).sqrt()
    top = ((origin + world * depth[..., None])[..., 1] > 0)[..., None]
    colour = torch.where(top, torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1]))
    alpha = (hit > 0).float()
    images = (colour * alpha[..., None]).view(8, size, size, 3).permute(0, 3, 1, 2)
    return images, alpha.view(8, 1, size, size), cameras


def test_carve_finds_shape_and_colours() -> None:
    images, alphas, cameras = sphere_views()
    g = carve(images, alphas, cameras, 1.14, 4000, torch.Generator().manual_seed(0))
    assert g is not None
    assert len(g) == 4000
    distance = g.means.norm(dim=1)
    # eight outlines leave a hull around the ball; its outermost voxels, of 0.036, lie inside it
    assert distance.min() > 0.5
    assert distance.max() < 0.75
    assert 0.55 < distance.median() < 0.65
    colours = 0.5 + SH_C0 * g.sh[:, 0]
    upper, lower = g.means[:, 1] > 0.15, (g.means[:, 1] < -0.15) & (g.means[:, 1] > -0.5)
    assert (colours[upper, 0] > colours[upper, 2]).float().mean() > 0.97
    assert (colours[lower, 2] > colours[lower, 0]).float().mean() > 0.95


def test_carve_of_nothing_is_none() -> None:
    images, alphas, cameras = sphere_views()
    assert carve(images, torch.zeros_like(alphas), cameras, 1.14, 100, torch.Generator()) is None


@pytest.fixture(scope="module")
def guidance(mini_models) -> MVDream:
    return MVDream.load(mini_models.parent / "mvdream", "cpu", torch.float32)


def poses(scenes: int) -> torch.Tensor:
    return orbit(15.0, torch.arange(4 * scenes) * 90.0, RADIUS, FOVY, 8, 8).camera_to_world


def test_guidance_loss_of_a_scene_does_not_depend_on_its_neighbour(guidance: MVDream) -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 3, guidance.image_size, guidance.image_size, requires_grad=True)
    conditions = torch.stack([guidance.prepare("a red cube", ""), guidance.prepare("a blue ball", "")])

    def loss(part: slice, seeds: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        views = slice(part.start * 4, part.stop * 4)
        return guidance.loss(
            lambda: images[views], poses(2)[views], conditions[part], torch.tensor([0.7] * len(seeds)), generators, 5.0
        )

    both = loss(slice(0, 2), [1, 2])
    alone = torch.cat([loss(slice(0, 1), [1]), loss(slice(1, 2), [2])])
    assert both.shape == (2,)
    assert torch.allclose(both, alone, rtol=1e-4)
    both.sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().sum() > 0


def test_texts_are_read_once_and_together(mini_models, monkeypatch) -> None:
    alone = MVDream.load(mini_models.parent / "mvdream", "cpu", torch.float32)
    guidance = MVDream.load(mini_models.parent / "mvdream", "cpu", torch.float32)
    read: list[int] = []
    guidance._words.encoder.register_forward_hook(lambda model, args, out: read.append(len(args[0])))
    prompts = ["a red cube", "a blue ball", "a red cube"]
    guidance.encode([*prompts, "ugly"])
    for prompt in prompts:
        expected = torch.stack([alone.prepare("ugly", "")[1], alone.prepare(prompt, "")[1]])
        assert torch.allclose(guidance.prepare(prompt, "ugly"), expected, atol=1e-5)
    assert read == [3]
    monkeypatch.setattr(text_cache, "KEPT", 2)
    guidance.prepare("a green cone", "ugly")
    assert list(guidance._words._known) == ["ugly", "a green cone"]


def test_guidance_samples_the_same_views_for_the_same_seed(guidance: MVDream) -> None:
    condition = guidance.prepare("a red cube", "")

    def draw(seed: int) -> torch.Tensor:
        return guidance.sample(condition, poses(2), torch.Generator().manual_seed(seed), 3, 2.0)

    first = draw(1)
    assert first.shape == (8, 3, guidance.image_size, guidance.image_size)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))


def test_guidance_keeps_a_known_first_view(guidance: MVDream) -> None:
    condition = guidance.prepare("", "")
    g = torch.Generator().manual_seed(0)
    first = torch.rand(3, guidance.image_size, guidance.image_size, generator=g)
    free = guidance.sample(condition, poses(2), torch.Generator().manual_seed(1), 10, 1.0)
    bound = guidance.sample(condition, poses(2), torch.Generator().manual_seed(1), 10, 1.0, first=first)
    kept = guidance._vae.decode(guidance._encode(first[None])).sample / 2 + 0.5
    assert torch.allclose(bound[:1], kept.clamp(0, 1), atol=1e-4)
    assert not torch.allclose(bound[1:], free[1:], atol=1e-4)  # the others see it


def test_a_known_first_view_has_no_noise_in_any_step(guidance: MVDream, monkeypatch) -> None:
    first = torch.rand(3, guidance.image_size, guidance.image_size, generator=torch.Generator().manual_seed(0))
    seen = []

    def guided(both, t, *_):
        seen.append((both.clone(), t.clone()))
        return torch.ones_like(both[0])

    monkeypatch.setattr(guidance, "_guided", guided)
    guidance.sample(guidance.prepare("", ""), poses(2), torch.Generator().manual_seed(1), 4, 1.0, first=first)
    assert len(seen) == 4
    for step, (both, t) in zip((750, 500, 250, 0), seen, strict=True):
        assert torch.equal(both[1, 0], seen[0][0][1, 0])  # as it is, at step 0, where the model is to see it
        assert t[1].tolist() == [0, *[step] * 7]
        assert torch.equal(both[0, 1:], both[1, 1:])
        assert not torch.equal(both[0, 0], both[1, 0])  # and lost in noise like the others where it is not
        assert t[0].tolist() == [step] * 8


def test_the_outline_has_the_inside_s_colour_and_not_the_backdrop_s() -> None:
    backdrop, colour = torch.tensor([1.0, 0, 1]).view(3, 1, 1), torch.tensor([0.2, 0.6, 0.3]).view(3, 1, 1)
    alpha = torch.zeros(1, 1, 32, 32)
    alpha[..., 8:24, 8:24] = 1.0
    image = colour * alpha + backdrop * (1 - alpha)
    image[..., 8, :] = image[..., 23, :] = 0.5 * colour[:, 0] + 0.5 * backdrop[:, 0]  # mixed, and alpha does not know
    own = foreground(image, alpha, backdrop)
    assert torch.allclose(own * alpha, colour * alpha, atol=1e-5)
    thin = torch.zeros(1, 1, 32, 32)
    thin[..., 16] = 0.7
    image = colour * thin + backdrop * (1 - thin)
    assert torch.allclose(foreground(image, thin, backdrop)[..., 16], colour[..., 0].expand(1, 3, 32), atol=1e-5)


class NoGuidance:
    """Scores nothing, so that the known views alone drive a scene. Stands in for a diffusion model."""

    views = 4
    image_size = 64

    def prepare(self, prompt: str, negative_prompt: str) -> torch.Tensor:
        return torch.zeros(2, 1, 1)

    def loss(self, render, camera_to_world, conditions, noise_levels, generators, guidance_scale):
        return 0.0 * render().sum((1, 2, 3)).view(len(generators), -1).sum(1)

    def sample(self, condition, camera_to_world, *_):
        return sphere_views()[0] + (1 - sphere_views()[1]) * 0.5


def cutout(size: int = 32) -> torch.Tensor:
    image = torch.zeros(4, size, size)
    image[0, 6:26, 6:26] = image[3, 6:26, 6:26] = 1.0
    return image


def options(**more) -> DreamGaussianOptions:
    values = {"iters": 12, "ref_size": 32, "render_size": 32, "num_pts": 300, "background": [0.5, 0.5, 0.5]}
    values |= {
        "lambda_views": float(more.get("init") == "views"),
        "warmup_rgb_loss": False,
        "elevation": 0,
        "densification_interval": 5,
    }
    return DreamGaussianOptions(**(values | more))


def sculptor(**more) -> DreamGaussian:
    guidance: Any = NoGuidance()
    return DreamGaussian(guidance, options(**more), "cpu", lambda images: sphere_views()[1])


def run(dg: DreamGaussian, seeds: list[int]) -> list[torch.Tensor]:
    scenes = [dg.begin(Subject("a red square", cutout(), seed)) for seed in seeds]
    while not all(scene.done for scene in scenes):
        dg.tick(scenes)
    return [torch.cat([t.detach().flatten() for t in s.gaussians().tensors().values()]) for s in scenes]


@pytest.mark.parametrize("init", ["ball", "views"])
def test_a_scene_is_the_same_alone_and_beside_another(init: str) -> None:
    dg = sculptor(init=init)
    together = run(dg, [3, 4])
    assert torch.equal(run(dg, [3])[0], run(dg, [3])[0])
    assert torch.allclose(together[0], run(dg, [3])[0], atol=1e-3)
    assert together[0].shape != together[1].shape or not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("init", ["ball", "views"])
def test_a_scene_begun_before_its_picture_is_the_same(init: str) -> None:
    dg = sculptor(init=init)
    early = dg.begin(Subject("a red square", cutout(), 3, dg.prefetch("a red square", 3)))
    while not early.done:
        dg.tick([early])
    result = torch.cat([t.detach().flatten() for t in early.gaussians().tensors().values()])
    assert torch.equal(result, run(dg, [3])[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_nothing_waits_for_a_sketch() -> None:
    guidance: Any = NoGuidance()
    dg = DreamGaussian(guidance, options(init="ball"), "cuda", lambda images: images)
    try:
        torch.cuda.set_sync_debug_mode("error")
        dg.prefetch("a red square", 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("more", [{"init": "ball"}, {"init": "views"}, {"init": "ball", "render_size": 64}])
def test_known_views_pull_as_the_loss_says(more: dict) -> None:
    dg = sculptor(lambda_reference=0.7, **more)
    scenes = [dg.begin(Subject("a red square", cutout(), seed)) for seed in (1, 2)]
    renders = optimiser._render(scenes)
    losses = []
    for scene, render in zip(scenes, renders, strict=True):
        wanted, weights = scene.known_views()
        shown = Views(render.known.premultiplied.clamp(0, 1), render.known.alpha).at(32)
        colour = wanted.premultiplied + (1 - wanted.alpha) * render.background[:, :, None, None]
        errors = 10_000 * (shown.premultiplied - colour).square().mean((1, 2, 3))
        losses.append((weights * (errors + 1_000 * (shown.alpha - wanted.alpha).square().mean((1, 2, 3)))).sum())
    leaves = [tensor for scene in scenes for tensor in scene.gaussians().tensors().values()]
    expected = torch.autograd.grad(torch.stack(losses).sum(), leaves, retain_graph=True)
    torch.autograd.backward(*optimiser._known_views_gradients(scenes, renders))
    assert expected[0].abs().max() > 0
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.allclose(gradient_of(leaf), gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_a_ball_takes_the_shape_and_colour_of_the_reference() -> None:
    from generation.splats.rasterize import rasterize

    dg = sculptor(init="ball", iters=150, num_pts=1500, density_end_iter=0)
    scene = dg.begin(Subject("a red square", cutout(), 0))
    camera = orbit(0.0, 0.0, RADIUS, FOVY, 32, 32)

    def error() -> float:
        rgb, _, _ = rasterize(scene.gaussians(), camera, 32, 32, torch.zeros(3))
        return float(((rgb[0].permute(2, 0, 1) - cutout()[:3]) ** 2).mean())

    before = error()
    while not scene.done:
        dg.tick([scene])
    assert error() < 0.25 * before
    assert math.isfinite(error())


def test_spherical_harmonics_of_the_asked_degree() -> None:
    assert sculptor(init="views", sh_degree=1).begin(Subject("", cutout(), 0)).gaussians().sh.shape[1] == 4


def test_harmonics_learn_at_a_twentieth_of_the_colours_rate() -> None:
    """As in 3DGS, which gives Adam feature_lr / 20 for f_rest (its scene/gaussian_model.py)."""
    dg = sculptor(init="ball", sh_degree=2, feature_lr=0.01, density_end_iter=0)
    scenes = [dg.begin(Subject("a red square", cutout(), seed)) for seed in (0, 1)]
    wanted = []
    for scene in scenes:
        sh = scene.gaussians().sh.detach()
        dc, rest = sh[:, :1].clone().requires_grad_(), sh[:, 1:].clone().requires_grad_()
        groups = [{"params": [dc], "lr": 0.01}, {"params": [rest], "lr": 0.01 / 20}]
        wanted.append((dc, rest, torch.optim.Adam(groups, eps=1e-15)))
    gradients: list[torch.Tensor] = []
    step_together = optimiser.step_together

    def step(optimisers: list[torch.optim.Adam]) -> None:
        gradients.extend(gradient_of(scene.gaussians().sh).clone() for scene in scenes)
        step_together(optimisers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimiser, "step_together", step)
        for _ in range(3):
            gradients.clear()
            dg.tick(scenes)
            for scene, gradient, (dc, rest, adam) in zip(scenes, gradients, wanted, strict=True):
                dc.grad, rest.grad = gradient[:, :1].clone(), gradient[:, 1:].clone()
                adam.step()
                assert torch.allclose(scene.gaussians().sh, torch.cat([dc, rest], 1), atol=1e-6)
    assert rest.abs().max() > 1e-3


class Asked(NoGuidance):
    """Remembers what it is asked."""

    def __init__(self) -> None:
        self.prepared: list[tuple[str, str]] = []
        self.scored = 0

    def prepare(self, prompt: str, negative_prompt: str) -> torch.Tensor:
        self.prepared.append((prompt, negative_prompt))
        return super().prepare(prompt, negative_prompt)

    def loss(self, render, camera_to_world, conditions, *more):
        self.scored += len(conditions)
        return super().loss(render, camera_to_world, conditions, *more)


@pytest.mark.parametrize("init", ["ball", "views"])
def test_mvdream_is_not_asked_for_a_picture_s_missing_words(init: str) -> None:
    """What it draws around a picture is drawn with the picture in sight; scores by "" are none."""
    guidance: Any = Asked()
    dg = DreamGaussian(guidance, options(init=init, iters=2), "cpu", lambda images: sphere_views()[1])
    picture, words = dg.begin(Subject("", cutout(), 0)), dg.begin(Subject("a red square", cutout(), 0))
    assert [prompt for prompt, _ in guidance.prepared] == ["", "a red square, 3d asset"][init == "ball" :]
    before = picture.gaussians().means.detach().clone()
    dg.tick([picture, words])
    assert guidance.scored == 1
    dg.tick([picture])
    assert guidance.scored == 1
    assert picture.done
    assert not torch.equal(before, picture.gaussians().means)


def test_a_rest_between_two_ticks_changes_nothing(mini_models) -> None:
    text = MVDream.load(mini_models.parent / "mvdream", "cpu", torch.float32)
    image = Zero123.load(mini_models.parent / "zero123", "cpu", torch.float32, stable=False)

    def result(offloads: bool) -> torch.Tensor:
        given = options(iters=2, lambda_zero123=1.0, num_pts=50)
        dg = DreamGaussian(text, given, "cpu", lambda images: images[:, :1], image)
        scene = dg.begin(Subject("a red square", cutout(), 3))
        while not scene.done:
            dg.tick([scene])
            if offloads:
                dg.offload()
                dg.offload()
                dg.onload()
                dg.onload()
        return scene.gaussians().means.detach()

    assert torch.equal(result(offloads=True), result(offloads=False))


def test_all_networks_of_a_guidance_are_offloaded(mini_models) -> None:
    for guidance in (
        MVDream.load(mini_models.parent / "mvdream", "cpu", torch.float32),
        Zero123.load(mini_models.parent / "zero123", "cpu", torch.float32, stable=False),
    ):
        parts = [part for part in vars(guidance).values() if isinstance(part, torch.nn.Module)]
        parameters = {id(p): p for part in parts for p in part.parameters()}.values()
        guidance.offload()
        pinned = {id(p): p.data_ptr() for p in parameters}
        guidance.onload()
        guidance.offload()
        assert all(p.data_ptr() == pinned[id(p)] for p in parameters)
        assert {id(p) for p, _ in guidance._offloaded._pinned} == set(pinned)
