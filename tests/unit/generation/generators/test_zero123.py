"""Zero123 as guidance, alone and beside MVDream, with random models of a true layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from generation.generators.base import Subject
from generation.generators.dreamgaussian.guidance.zero123 import Zero123, camera_numbers
from generation.generators.dreamgaussian.optimiser import DreamGaussian
from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.splats.cameras import orbit
from tests.support.tensors import gradient

RADIUS, FOVY = 2.0, 49.1


@pytest.fixture(scope="module")
def zero123(mini_models) -> Zero123:
    return Zero123.load(mini_models.parent / "zero123", "cpu", torch.float32, stable=False)


def cutout(colour: int = 0, size: int = 32) -> Tensor:
    image = torch.zeros(4, size, size)
    image[colour, 6:26, 6:26] = image[3, 6:26, 6:26] = 1.0
    return image


def poses(*azimuths: float) -> Tensor:
    return orbit(10.0, torch.tensor(azimuths), RADIUS, FOVY, 8, 8).camera_to_world


def test_camera_numbers_are_relative_to_the_known_view():
    known = torch.tensor([20.0, 20.0])
    cameras = orbit(torch.tensor([20.0, -10.0]), torch.tensor([0.0, 90.0]), RADIUS, FOVY, 8, 8).camera_to_world
    same, lower = camera_numbers(cameras, known, stable=False)
    assert torch.allclose(same, torch.tensor([0.0, 0.0, 1.0, 0.0]), atol=1e-6)
    assert torch.allclose(lower, torch.tensor([math.pi / 6, 1.0, 0.0, 0.0]), atol=1e-6)
    assert camera_numbers(cameras, known, stable=True)[0, 3] == pytest.approx(math.radians(70))


def test_loss_of_a_scene_does_not_depend_on_its_neighbour(zero123):
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    conditions = torch.stack([zero123.prepare(cutout(0), 0.0), zero123.prepare(cutout(2), 0.0)])
    where = poses(0.0, 120.0)

    def loss(part: slice, seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return zero123.loss(
            lambda: images[part], where[part], conditions[part], torch.tensor([0.7] * len(seeds)), generators, 5.0
        )

    both = loss(slice(0, 2), [1, 2])
    assert both.shape == (2,)
    assert torch.allclose(both, torch.cat([loss(slice(0, 1), [1]), loss(slice(1, 2), [2])]), rtol=1e-4)
    both.sum().backward()
    assert torch.isfinite(gradient(images)).all()
    assert (gradient(images).abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("change", ["view", "camera", "elevation"])
def test_loss_depends_on(zero123, change):
    image = torch.full((1, 3, 40, 40), 0.5)

    def loss(colour: int = 0, azimuth: float = 30.0, elevation: float = 0.0) -> float:
        condition = zero123.prepare(cutout(colour), elevation)[None]
        generator = torch.Generator().manual_seed(1)
        return float(zero123.loss(lambda: image, poses(azimuth), condition, torch.tensor([0.5]), [generator], 5.0))

    changed = {"view": loss(colour=2), "camera": loss(azimuth=150.0), "elevation": loss(elevation=40.0)}[change]
    assert changed != pytest.approx(loss(), rel=1e-5)
    assert loss() == loss()


class Sketch:
    """Notes what a guidance is asked. The loss pulls the renders to one grey level."""

    def __init__(self, views: int, level: float) -> None:
        self.views, self.level = views, level
        self.calls: list[tuple] = []

    def prepare(self, *about: object) -> Tensor:
        self.calls.append(about)
        return torch.zeros(1)

    def loss(self, render, camera_to_world, conditions, noise_levels, generators, guidance_scale):
        images = render()
        assert len(images) == len(camera_to_world) == self.views * len(conditions)
        assert len(conditions) == len(noise_levels) == len(generators)
        self.calls.append((len(images), len(conditions), guidance_scale))
        return (images - self.level).square().flatten(1).mean(1).view(-1, self.views).sum(1)


def sculptor(text: Any, image: Any, **more) -> DreamGaussian:
    values = {"iters": 4, "ref_size": 32, "render_size": 32, "num_pts": 200, "elevation": -20}
    options = DreamGaussianOptions(**values | {"lambda_zero123": 2.0 if image else 0.0, "density_end_iter": 0} | more)
    return DreamGaussian(text, options, "cpu", lambda images: images[:, :1], image)


def test_alone_it_sees_one_view_a_draw():
    image = Sketch(1, 0.3)
    dg = sculptor(None, image, batch_size=3)
    scene = dg.begin(Subject("a red cube", cutout(), 0))
    dg.tick([scene, dg.begin(Subject("a red cube", cutout(), 1))])
    assert [about[1] for about in image.calls[:2]] == [20.0, 20.0]  # the known view's elevation, upwards
    assert image.calls[2:] == [(6, 6, 5.0)]
    assert scene.condition is None


def test_beside_mvdream_it_sees_each_of_the_four_views():
    text, image = Sketch(4, 0.3), Sketch(1, 0.3)
    dg = sculptor(text, image, guidance_scale=50.0, negative_prompt="ugly")
    dg.tick([dg.begin(Subject("a red cube", cutout(), 0))])
    assert text.calls == [("a red cube, 3d asset", "ugly"), (4, 1, 50.0)]
    assert image.calls[1:] == [(4, 4, 5.0)]


def test_a_scene_without_words_is_left_to_it():
    text, image = Sketch(4, 0.3), Sketch(1, 0.3)
    dg = sculptor(text, image)
    dg.tick([dg.begin(Subject("", cutout(), 0)), dg.begin(Subject("a red cube", cutout(), 1))])
    assert text.calls == [("a red cube, 3d asset", ""), (4, 1, 50.0)]
    assert image.calls[2:] == [(8, 8, 5.0)]


def test_weight_zero_is_not_asked():
    text, image = Sketch(4, 0.3), Sketch(1, 0.3)
    dg = sculptor(text, image, lambda_sd=0)
    dg.tick([dg.begin(Subject("a red cube", cutout(), 0))])
    assert len(text.calls) == 1
    assert len(image.calls) == 2


def test_a_scene_is_the_same_alone_and_beside_another(zero123):
    dg = sculptor(None, zero123)

    def run(seeds: list[int]) -> list[Tensor]:
        scenes = [dg.begin(Subject("", cutout(seed % 3), seed)) for seed in seeds]
        dg.tick(scenes)
        return [torch.cat([t.detach().flatten() for t in s.gaussians().tensors().values()]) for s in scenes]

    together, alone = run([1, 2]), run([1])
    difference = (together[0] - alone[0]).abs()
    # Adam's first step has the learning rate's size whatever the gradient's: about zero, rounding decides its sign.
    assert (difference > 1e-3).float().mean() < 0.01
    assert (together[0] - together[1]).abs().mean() > 0.01
