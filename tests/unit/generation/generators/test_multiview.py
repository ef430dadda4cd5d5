"""Views drawn a step at a time: objects do not disturb each other, whatever steps they are at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from generation.accelerate.unet import compile_unet
from generation.generators.multiview import ImageDream, MVDreamViews, ViewSampling
from generation.generators.multiview.sampling import Sampler, Schedule
from generation.weights import WeightsError
from scripts.tools import small_imagedream
from tests.support import mini_checkpoints

RINGS = ((20.0, 0.0), (20.0, 90.0), (20.0, 180.0), (20.0, 270.0), (5.0, 45.0), (5.0, 135.0), (5.0, 225.0), (5.0, 315.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imagedream")
    mini_checkpoints.imagedream(folder)
    return folder


@pytest.fixture(scope="module")
def multiview(folder) -> ImageDream:
    return ImageDream.load(folder, "cpu", torch.float32, front_azimuth=90.0, steps=4)


@pytest.fixture(scope="module")
def of_words(mini_models) -> MVDreamViews:
    return MVDreamViews.load(mini_models.parent / "mvdream", "cpu", torch.float32, steps=4)


def cutouts() -> list[Tensor]:
    first = small_imagedream.cutout()
    return [first, first.flip(1), first.flip(2)]


def finish(multiview: ImageDream | MVDreamViews, samplings: list[ViewSampling]) -> Tensor:
    while not all(sampling.done for sampling in samplings):
        multiview.step([sampling for sampling in samplings if not sampling.done])
    return multiview.views(samplings)


@pytest.mark.parametrize("kind", ["words", pytest.param("picture", marks=pytest.mark.slow)])
def test_objects_join_between_steps_and_stay_what_they_are_alone(kind, request):
    draws = request.getfixturevalue("multiview" if kind == "picture" else "of_words")
    words, seeds = ["a red cube", "", "a blue ball"], [1, 2, 3]
    pictures = cutouts() if kind == "picture" else [None] * 3
    alone = [finish(draws, draws.begin([w], [p], [s]))[0] for w, p, s in zip(words, pictures, seeds, strict=True)]
    first = draws.begin(words[:1], pictures[:1], seeds[:1])
    draws.step(first)
    together = first + draws.begin(words[1:], pictures[1:], seeds[1:])
    assert [sampling.fraction for sampling in together] == [0.25, 0, 0]
    views = finish(draws, together)
    assert views.shape == (3, 4, 3, draws.image_size, draws.image_size)
    for drawn, expected in zip(views, alone, strict=True):
        assert torch.allclose(drawn, expected, atol=1e-4)
    assert not torch.allclose(views[0], views[1], atol=1e-2)


@pytest.mark.slow
def test_a_seed_gives_other_views(multiview):
    one, again, other = finish(multiview, multiview.begin([""] * 3, [small_imagedream.cutout()] * 3, [1, 1, 2]))
    assert torch.allclose(one, again, atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.slow
def test_words_count_beside_a_picture(multiview):
    picture = small_imagedream.cutout()
    without, given = finish(multiview, multiview.begin(["", "a red cube"], [picture] * 2, [1, 1]))
    assert not torch.allclose(without, given, atol=1e-4)


@pytest.mark.slow
def test_a_failed_step_leaves_all_as_they_were(multiview, monkeypatch):
    samplings = multiview.begin([""] * 3, cutouts(), [1, 2, 3])
    before, calls = [sampling.latents for sampling in samplings], []
    guided = multiview._guided

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:  # in the second piece: of two objects, then of one
            raise torch.OutOfMemoryError("CUDA out of memory")
        return guided(*args)

    monkeypatch.setattr(multiview._sampler, "_guided", fails)
    with pytest.raises(torch.OutOfMemoryError):
        multiview.step(samplings)
    assert all(
        sampling.latents is latents and sampling.at == 0 for sampling, latents in zip(samplings, before, strict=True)
    )


@pytest.mark.slow
def test_a_picture_is_needed(multiview):
    with pytest.raises(ValueError, match="a cut-out is missing"):
        multiview.begin(["a red cube", ""], [small_imagedream.cutout(), None], [1, 2])


def test_a_known_view_is_kept_and_seen(mini_models):
    draws = MVDreamViews.load(
        mini_models.parent / "mvdream", "cpu", torch.float32, steps=4, views=RINGS, known_view=True,
        backdrop=(1.0, 0.0, 1.0),
    )  # fmt: skip
    picture = small_imagedream.cutout(64)
    picture[3, :, :32] = 0
    free = MVDreamViews.load(mini_models.parent / "mvdream", "cpu", torch.float32, steps=4, views=RINGS)
    (views,), (others,) = (finish(each, each.begin(["a cube"], [picture], [1])) for each in (draws, free))
    assert views.shape == (8, 3, draws.image_size, draws.image_size)
    behind = torch.tensor([1.0, 0, 1]).view(3, 1, 1)
    over = picture[:3] * picture[3:] + behind * (1 - picture[3:])
    over = torch.nn.functional.interpolate(over[None], (draws.image_size,) * 2, mode="area")
    latents = draws._vae.encode(over * 2 - 1).latent_dist.mode()
    assert torch.allclose(views[:1], (draws._vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), atol=1e-4)
    assert not torch.allclose(views[1:], others[1:], atol=1e-4)
    with pytest.raises(ValueError, match="a cut-out is missing"):
        draws.begin(["a cube"], [None], [1])


def test_it_is_the_guidance_s_sampling(mini_models):
    """DreamGaussian's MVDream draws the same views."""
    from generation.generators.dreamgaussian.guidance.mvdream import MVDream
    from generation.splats.cameras import orbit

    folder = mini_models.parent / "mvdream"
    draws = MVDreamViews.load(
        folder, "cpu", torch.float32, steps=4, guidance_scale=3.0, front_azimuth=90.0, views=RINGS
    )
    guidance = MVDream.load(folder, "cpu", torch.float32, front_azimuth=90.0)
    elevations, azimuths = map(torch.tensor, zip(*RINGS, strict=True))
    poses = orbit(elevations, azimuths, 2.5, 49.1, 8, 8).camera_to_world
    expected = guidance.sample(guidance.prepare("a cube", ""), poses, torch.Generator().manual_seed(1), 4, 3.0)
    assert torch.allclose(finish(draws, draws.begin(["a cube"], [None], [1]))[0], expected, atol=1e-5)


@pytest.mark.slow
def test_it_rests_and_wakes(folder):
    multiview = ImageDream.load(folder, "cpu", torch.float32, steps=2)
    before = finish(multiview, multiview.begin([""], cutouts()[:1], [1]))
    samplings = multiview.begin([""], cutouts()[:1], [1])
    multiview.step(samplings)
    for _ in range(2):
        multiview.offload()
        multiview.offload()
        multiview.onload()
        multiview.onload()
    assert torch.equal(finish(multiview, samplings), before)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["words", pytest.param("picture", marks=pytest.mark.slow)])
def test_the_compiled_form_draws_the_same(kind, request, mini_models):
    def load() -> ImageDream | MVDreamViews:
        if kind == "picture":
            return ImageDream.load(request.getfixturevalue("folder"), "cpu", torch.float32, steps=2)
        return MVDreamViews.load(mini_models.parent / "mvdream", "cpu", torch.float32, steps=2)

    plain, other = load(), load()
    with torch.compiler.set_stance("force_eager"):
        compile_unet(other._unet.to(memory_format=torch.channels_last))
        expected, drawn = (finish(each, each.begin(["a cube", ""], cutouts()[:2], [1, 2])) for each in (plain, other))
    assert torch.allclose(drawn, expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 30, 50])
def test_ddim_is_diffusers(steps):
    scheduler = small_imagedream.scheduler()
    schedule = Schedule.of(scheduler, steps, "cpu")
    noise = torch.randn(steps, 1, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    sampling = ViewSampling(start, torch.zeros(2, 1, 1), (), steps)
    called: list[torch.Tensor] = []

    def known_noise(both: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        called.append(t)
        return noise[sampling.at].flatten(0, 1)

    sampler = Sampler(schedule, known_noise)
    expected = start
    for number, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(noise[number, 0], t, expected).prev_sample
        sampler.step([sampling])
    assert torch.allclose(sampling.latents, expected, atol=1e-5)
    assert sampling.done
    assert torch.equal(torch.stack(called)[:, 0, 0], scheduler.timesteps)
    with pytest.raises(ValueError, match="no further step"):
        sampler.step([sampling])


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(WeightsError, match="prediction_type v_prediction, clip_sample True"):
        Schedule.of(DDIMScheduler(prediction_type="v_prediction"), 10, "cpu")
