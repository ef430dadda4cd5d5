"""LGM as a generator: views first, then one pass; nothing depends on what is made beside it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from generation.generators import kinds
from generation.generators.base import Checkpoint, Subject
from generation.generators.lgm.generator import Lgm, _load_multiview, recentred
from generation.generators.lgm.network import LGM, Config, to_gaussians
from generation.generators.lgm.options import LgmOptions
from generation.generators.multiview import ImageDream, MVDreamViews
from generation.schema.options import ModelChoice, Models, SettingsError
from generation.settings import CONFIGS, ROOT
from generation.splats.cameras import orbit
from generation.splats.rasterize import rasterize
from generation.stages.background import recentre
from generation.weights import WeightsError
from generation.weights.registry import REGISTRY

SMALL = Config(
    down_channels=(8, 16), down_attention=(False, True), up_channels=(16, 8), up_attention=(True, False),
    attention_heads=2, norm_groups=4, input_size=16, position="ray",
)  # fmt: skip


@dataclass
class ViewSampling:
    words: str
    seed: int
    cutout: Tensor | None
    at: int = 0

    @property
    def done(self) -> bool:
        return self.at >= 3

    @property
    def fraction(self) -> float:
        return self.at / 3


@dataclass
class MultiViewModel:
    """In place of a diffusion model: views of noise, by words and seed."""

    image_size: int = 16
    begun: list[list[str]] = field(default_factory=list)
    together: list[int] = field(default_factory=list)

    def begin(self, words, cutouts, seeds):
        self.begun.append(list(words))
        return [ViewSampling(*each) for each in zip(words, seeds, cutouts, strict=True)]

    def step(self, samplings):
        self.together.append(len(samplings))
        for sampling in samplings:
            sampling.at += 1

    def views(self, samplings):
        seeds = [sampling.seed + len(sampling.words) for sampling in samplings]
        return torch.stack([torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def truncation(self, text):
        return (77, 90) if len(text) > 20 else None

    def encode(self, texts):
        self.begun.append(list(texts))


def generator(**options) -> tuple[Lgm, MultiViewModel]:
    torch.manual_seed(0)
    network, multiview = LGM(SMALL).eval().requires_grad_(False), MultiViewModel()
    matting = lambda images: torch.ones_like(images[:, :1])  # noqa: E731
    return Lgm(network, multiview, LgmOptions(**options), "cpu", matting), multiview  # type: ignore[arg-type]


def made(lgm: Lgm, subjects: list[Subject]) -> list[Tensor]:
    works = [lgm.begin(subject) for subject in subjects]
    fractions: list[list[float]] = [[] for _ in works]
    while unfinished := [work for work in works if not work.done]:
        lgm.tick(unfinished)
        for each, work in zip(fractions, works, strict=True):
            each.append(work.fraction)
    assert all(each == sorted(each) and each[-1] == 1 for each in fractions)
    return [work.gaussians().means for work in works]


def test_neighbours_do_not_matter():
    subjects = [Subject("a red cube", None, seed) for seed in range(5)]
    lgm, multiview = generator(views_from="words")
    together = made(lgm, subjects)
    assert multiview.begun == [["a red cube, 3d asset"] * 5]
    assert multiview.together == [5, 5, 5]
    for subject, means in zip(subjects, together, strict=True):
        (alone,) = made(lgm, [subject])
        assert alone.shape == means.shape
        assert torch.allclose(alone, means, atol=1e-5)


def test_works_join_and_leave():
    lgm, multiview = generator(views_from="words")
    first = lgm.begin(Subject("a", None, 1))
    lgm.tick([first])
    second = lgm.begin(Subject("b", None, 2))
    for _ in range(3):
        lgm.tick([work for work in (first, second) if not work.done])
    assert first.done
    assert not second.done
    assert multiview.together == [1, 2, 2, 1]
    assert first.fraction == 1
    assert second.fraction == 0.95
    lgm.tick([second])
    assert second.done
    assert len(second.gaussians()) > 0
    second.gaussians().check()


def test_where_views_come_from():
    words, _ = generator(views_from="words")
    assert words.cutout is None
    assert words.truncation("a" * 30) == {"mvdream": (77, 90)}
    assert words.truncation("a") == {}
    picture, multiview = generator(views_from="picture")
    assert picture.cutout == (16, 0.2)
    picture.encode(["a red cube"])
    assert multiview.begun == [[""]]  # ImageDream needs no words
    both, multiview = generator(views_from="picture_and_words", view_template="{prompt}")
    both.encode(["a red cube", ""])
    assert multiview.begun == [["a red cube", ""]]


def test_almost_transparent_gaussians_are_left_out():
    splats = torch.rand(6, 14)
    splats[:, 3] = torch.tensor([0.0049, 0.005, 0.5, 1.0, 0.0, 1.0])
    gaussians = to_gaussians(splats)
    assert len(gaussians) == 4
    assert torch.isfinite(gaussians.logit_opacities).all()
    assert torch.allclose(gaussians.log_scales.exp(), splats[[1, 2, 3, 5], 4:7], atol=1e-6)


def test_too_few_gaussians_become_more_that_look_the_same():
    splats = torch.rand(60, 14, generator=torch.Generator().manual_seed(0))
    splats[:, :3] = (splats[:, :3] - 0.5) * 0.8
    splats[:, 4:7] *= 0.1
    few, many = to_gaussians(splats), to_gaussians(splats, at_least=120)
    assert len(few) == 60
    assert 120 <= len(many) < 160
    cameras = orbit(20.0, torch.tensor([0.0, 120.0]), 1.5, 49.1, 48, 48)
    (a, _, _), (b, _, _) = (rasterize(each, cameras, 48, 48, torch.ones(3)) for each in (few, many))
    assert float((a - b).abs().mean()) < 0.005
    a, b = a.clamp(0, 1), b.clamp(0, 1)
    assert float((a - b).abs().max()) < 0.06


def test_faint_gaussians_far_from_the_others_are_left_out():
    splats = torch.rand(40, 14)
    splats[:, :3] = (splats[:, :3] - 0.5) * 0.8
    splats[:, 3] = 0.9
    splats[0, :4] = torch.tensor([0.9, 0.0, 0.0, 0.04])
    splats[1, :4] = torch.tensor([0.0, 0.0, 0.0, 0.04])
    assert len(to_gaussians(splats)) == 40
    means = to_gaussians(splats, replace(SMALL, stray_opacity=0.05)).means
    assert len(means) == 39
    assert float(means.abs().max()) <= 0.4


def test_views_are_recentred_as_pictures_are():
    image, alpha = torch.rand(3, 64, 64), torch.zeros(1, 64, 64)
    alpha[:, 4:28, 30:62] = 1
    behind = torch.tensor([1.0, 1.0, 1.0]).view(3, 1, 1)
    cutout = recentre(image, alpha, 64, 0.2)
    wanted = cutout[:3] * cutout[3:] + 1 - cutout[3:]
    nothing = torch.zeros_like(alpha)
    moved, empty = recentred(torch.stack([image, image]), torch.stack([alpha, nothing]), behind, 0.2)
    assert float((moved - wanted).abs().mean()) < 0.05
    rows, columns = torch.nonzero((moved < 0.999).any(0), as_tuple=True)
    assert abs(int(columns.min()) - 6) <= 1
    assert abs(int(columns.max()) - 57) <= 1
    assert abs(int(rows.min()) + int(rows.max()) - 63) <= 1
    assert torch.equal(empty, torch.ones_like(empty))


@pytest.mark.parametrize(
    ("name", "kind", "views_from"), [("imagedream", ImageDream, "picture"), ("mvdream-sd2.1", MVDreamViews, "words")]
)
def test_the_views_are_drawn_for_the_network_s_cameras(monkeypatch, name, kind, views_from):
    """From the front of the model that draws them, by the registry, and at the angles of LGM's config."""
    told: dict = {}
    monkeypatch.setattr(kind, "load", lambda *_, **options: told.update(options))
    checkpoint = Checkpoint(Path(), REGISTRY[name], ModelChoice(model=name), "cpu")
    config = replace(SMALL, views=((5.0, 0.0), (20.0, 90.0)))
    options = LgmOptions(views_from=views_from, view_steps=7, guidance_scale=3)
    _load_multiview(checkpoint, options, config, offload=True)
    assert (told["front_azimuth"], told["views"]) == (90.0, config.views)
    assert (told["steps"], told["guidance_scale"], told["offload_encoders"]) == (7, 3, True)


def test_imagedream_draws_on_white_alone():
    checkpoint = Checkpoint(Path(), REGISTRY["imagedream"], ModelChoice(model="imagedream"), "cpu")
    with pytest.raises(WeightsError, match="draws on white"):
        _load_multiview(checkpoint, LgmOptions(), replace(SMALL, background=(0.0, 0.0, 0.0)), offload=False)


class TestConfigs:
    @pytest.mark.parametrize(
        ("name", "models", "needed", "draws"),
        [
            ("lgm", "models_full", {"lgm", "imagedream"}, True),
            ("lgm_text", "models_full", {"lgm", "mvdream"}, False),
            ("tiny_lgm", "models_tiny", {"lgm", "mvdream"}, True),
        ],
    )
    def test_each_loads_and_its_checkpoints_are_known(self, name, models, needed, draws):
        options = kinds.load_options(CONFIGS / f"{name}.yaml")
        assert isinstance(options, LgmOptions)
        assert options.draws == draws
        asked = Models.load(CONFIGS / f"{models}.yaml").needed(options).keys()
        assert asked == needed | {"background", "clip"} | ({"text_to_image"} if draws else set())

    def test_steps_and_guidance_are_the_authors(self):
        picture, words = (kinds.load_options(CONFIGS / f"{name}.yaml") for name in ("lgm", "lgm_text"))
        assert picture == LgmOptions()
        assert isinstance(picture, LgmOptions)
        assert isinstance(words, LgmOptions)
        about = [(each.view_steps, each.guidance_scale, each.recentre_views) for each in (picture, words)]
        assert about == [(30, 5.0, False), (30, 7.5, True)]

    @pytest.mark.parametrize(
        ("line", "words"),
        [("views_from: nowhere", "views_from"), ("view_steps: 0", "view_steps"), ("iters: 3", "iters"),
         ("view_template: cube", "exactly once"),
         ("min_gaussians: 9000\nmax_gaussians: 8000", "min_gaussians 9000 is over max_gaussians 8000"),
         ("views_from: picture_and_words\nrecentre_views: true", "apart from the others")],
    )  # fmt: skip
    def test_what_can_not_be(self, tmp_path: Path, line, words):
        path = tmp_path / "lgm.yaml"
        path.write_text(f"generator: lgm\n{line}\n")
        with pytest.raises(SettingsError, match=words):
            kinds.load_options(path)

    def test_the_number_of_gaussians_can_be_limited(self):
        assert LgmOptions().capped(10_000).max_gaussians == 10_000
        splats = torch.rand(50, 14)
        few = to_gaussians(splats, at_most=20)
        assert len(few) == 20
        assert float(few.logit_opacities.sigmoid().min()) >= float(splats[:, 3].sort().values[29])


def test_the_tiny_one_takes_the_views_that_its_config_says():
    folder = ROOT / "generation" / "weights" / "tiny" / "lgm"
    if not folder.exists():
        pytest.skip("not trained yet")
    network = LGM.load(folder, "cpu", torch.float32)
    assert network.config.gaussians == 32_768
