"""What the tiny quality net learns from: planted flaws, distances of results, and which of two is the better."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from generation.splats.gaussians import Gaussians
from generation.stages.self_check.quality import WEIGHTS, Quality, QualityNet
from scripts.tiny_pack import compositions, distances, flaws, measure_quality, referee, results, train_quality
from scripts.tiny_pack.shapes import MAX_PRIMITIVES
from scripts.tiny_pack.training import PACK

SIZE = distances.SIZE
#: for each kind of flaw three views of a splat that training never saw, and below the same with the flaw
CASES = Path(__file__).parents[2] / "golden" / "quality"
NET = PACK / "quality"


def a_ball(count: int = 4000) -> Gaussians:
    """Red, in the validators' frame, opaque."""
    g = torch.Generator().manual_seed(0)
    means = 0.75 * F.normalize(torch.randn(count, 3, generator=g), dim=1)
    return Gaussians(
        means=means,
        quats=F.pad(torch.ones(count, 1), (0, 3)),
        log_scales=torch.full((count, 3), -3.6),
        logit_opacities=torch.full((count,), 4.0),
        sh=((torch.tensor([0.8, 0.1, 0.1]) - 0.5) / 0.28209479).expand(count, 1, 3).contiguous(),
    )


def a_disc(radius: float = 0.5, at: tuple[float, float] = (0.0, 0.0), colour=(0.8, 0.2, 0.1)) -> torch.Tensor:
    """Four views (4, 4, S, S) of premultiplied RGBA: a disc with a stripe."""
    ticks = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    x, y = (x - at[0]) / radius, (y - at[1]) / radius
    alpha = ((1 - (x * x + y * y).sqrt()) * radius * SIZE / 2 + 0.5).clamp(0, 1)
    stripe = 1 - 0.5 * (x.abs() < 0.2)
    image = torch.cat([torch.tensor(colour).view(3, 1, 1) * stripe * alpha, alpha[None]])
    return image.expand(4, -1, -1, -1).contiguous()


@pytest.mark.parametrize("strength", flaws.STRENGTHS)
@pytest.mark.parametrize("kind", flaws.KINDS)
@pytest.mark.slow
def test_a_planted_flaw_changes_the_share_of_pixels_that_it_says(kind: str, strength: float) -> None:
    ball = a_ball()
    planted = flaws.plant(ball, kind, strength, random.Random(1))
    assert planted is not None
    clean, alpha = flaws.drawn(ball, 150)  # other pixels than those it was made at
    seen = (flaws.drawn(planted[0], 150)[0] - clean).abs().amax(1) > 0.1
    share = float((seen.sum((1, 2)) / (alpha[:, 0] > 0.5).sum((1, 2))).mean())
    assert share == pytest.approx(strength, rel=0.35)


def test_flaws_in_images_are_counted() -> None:
    torch.manual_seed(3)
    rgba = a_disc().repeat(8, 1, 1, 1)
    rgb, alpha = rgba[:, :3] + 1 - rgba[:, 3:], rgba[:, 3:]
    other = a_disc(colour=(0.1, 0.2, 0.9)).repeat(8, 1, 1, 1)
    flawed, share = flaws.in_images(rgb, alpha, other[:, :3] + 1 - other[:, 3:], other[:, 3:])
    counted = ((flawed - rgb).abs().amax(1) > 0.1).sum((1, 2)) / (alpha > 0.5).sum((1, 2, 3))
    assert torch.equal(share, counted)
    assert flawed.min() >= 0
    assert flawed.max() <= 1
    assert (share > 0.005).float().mean() > 0.7
    assert share.max() < 1.5


def test_distance_forgives_place_size_and_tint_and_nothing_else() -> None:
    exact = a_disc()
    moved = distances.distance(a_disc(0.52, (0.06, -0.04)), exact)
    tinted = distances.distance(a_disc(colour=(0.85, 0.24, 0.1)), exact)
    assert moved.max() < 0.08
    assert tinted.max() < 0.03
    blurred = distances.distance(F.avg_pool2d(exact, 7, 1, 3), exact)
    worse = distances.distance(F.avg_pool2d(exact, 15, 1, 7), exact)
    blue = distances.distance(a_disc(colour=(0.1, 0.2, 0.8)), exact)
    holed = exact.clone()
    holed[:, :, SIZE // 2 :, SIZE // 2 :] = 0
    assert moved.max() < blurred.min() < worse.min()
    assert min(blue.min(), distances.distance(holed, exact).min()) > 0.15


def test_near_ties_are_no_pairs() -> None:
    records: list[dict] = [
        {"object": name, "way": "fast 0", "flaw": None, "spec": {}, "distance": far, "distance_again": far + 0.04}
        for name, far in (("a", 0.30), ("a", 0.26), ("a", 0.2), ("b", 0.1))
    ]
    margin = measure_quality.exemplars_margin(records)
    assert margin == pytest.approx(0.04)
    assert sorted(measure_quality.real_pairs(records, margin)) == [(2, 0), (2, 1)]
    assert sorted(measure_quality.real_pairs(records, 0.08)) == [(2, 0)]
    assert set(measure_quality.any_pairs(records, margin, 50, random.Random(0))) == {(3, 0), (3, 1), (3, 2)}


def test_training_never_sees_the_shapes_of_the_test() -> None:
    rng = random.Random(0)
    seen = [results.training_spec(rng) for _ in range(5000)]
    unseen = {*results.UNSEEN, *results.CALIBRATION}
    assert not {s.shape for s in seen} & unseen
    assert not {s.base for s in seen} & unseen
    assert not set(results.SEEN) & unseen
    assert len(unseen) == 10
    assert len(results.UNSEEN) == 6
    batches = results.unseen_batches(24, 8)
    for split, shapes in (("test", results.UNSEEN), ("calibration", results.CALIBRATION)):
        assert {w.shape for b in batches if b["split"] == split for w in b["wanted"]} == set(shapes)


def test_other_seeds_have_other_training_objects() -> None:
    ours, theirs = ([results.training_batch(n, 2, seed) for n in range(10)] for seed in (0, 1))
    assert ours == [results.training_batch(n, 2, 0) for n in range(10)]
    assert not [a for a, b in zip(ours, theirs, strict=True) if a["wanted"] == b["wanted"]]
    assert not {b["seed"] for b in ours} & {b["seed"] for b in theirs}
    ways = [way for b in ours for way in (b["ways"] or {}).values()]
    assert {type(way) for way in ways} == {results.Pass, results.Way}


@pytest.mark.slow
def test_results_of_both_generators_are_records() -> None:
    few = {"init_views_steps": 2, "lambda_sd": 0.0}
    ways: dict[str, results.Pass | results.Way] = {
        "lgm": results.Pass(steps=2),
        "bent": results.Pass(noise=0.0),
        "dreamgaussian": results.Way("tiny_mv_ultra_fast", (0,), few),
    }
    batch = {"split": "train", "first": 0, "seed": 1, "ways": ways, "wanted": [results.ObjectSpec("mug", "red")]}
    records = [r for r in results.Maker("cpu").make(batch) if r["flaw"] is None]
    assert [r["way"].split()[0] for r in records] == list(ways)
    assert {tuple(r["views"].shape) for r in records} == {(results.KEPT, 3, 168, 168)}
    far = {r["way"].split()[0]: r["distance"] for r in records}
    assert far["bent"] < 0.3  # it began with exact views
    assert far["bent"] < far["lgm"]  # two steps draw a blur


def test_pairs_are_told_apart_by_their_generators() -> None:
    records: list[dict] = [
        {"object": "a", "way": way, "flaw": None, "spec": {}, "distance": far, "distance_again": far}
        for way, far in (("lgm 0", 0.1), ("lgm in few steps 0", 0.2), ("ultra fast 40", 0.4))
    ]
    of_views = torch.tensor([3.0, 1.0, 2.0])[:, None].expand(-1, 16)
    found = measure_quality.by_generator(records, of_views, 0.03, 0)
    assert found["lgm_of_one_prompt"] == {"pairs": 1, "right": 1.0}
    assert found["with_dreamgaussian_of_one_prompt"] == {"pairs": 2, "right": 0.5}
    assert found["lgm_of_different_prompts"]["pairs"] == 0


def test_a_referee_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = referee.Referee().eval()
    save_file(one.state_dict(), tmp_path / "referee.safetensors")
    views = torch.rand(1, 3, 112, 112)
    assert referee.load(tmp_path / "referee.safetensors").score(views) == one.score(views)
    assert 0 < one.score(views) < 1


def test_compositions_have_colours_and_room_for_them() -> None:
    rng = random.Random(1)
    for _ in range(500):
        parts = compositions.composition(rng, results.SEEN)
        assert 1 <= len(parts) <= MAX_PRIMITIVES
        assert all(p.colour is not None and max(p.size[:3]) > 0.01 for p in parts)


def test_worth_falls_with_distance_and_with_a_flaws_share() -> None:
    worth = train_quality.worth_of_distance(torch.linspace(0, 2, 50), {"low": 0.15, "high": 0.45})
    assert float(worth[0]) == pytest.approx(train_quality.EXACT)
    assert (worth.diff() <= 0).all()
    assert worth[-1] < 0.1
    share = train_quality.worth_of_share(torch.tensor([0.0, 0.02, 0.08, 0.3]))
    assert share[0] == 1
    assert (share.diff() < 0).all()
    assert share[-1] < 0.2


def test_objective_pulls_the_better_one_up() -> None:
    worth = torch.tensor([0.9, 0.4]).view(2, 1, 1).expand(2, 3, 4)
    images = torch.zeros(2, 3, 4, 1)

    def net(level: float):
        return lambda x: torch.cat([torch.full((12,), level), torch.full((12,), -level)])

    right, wrong = (float(train_quality.objective(net(level), images, worth)) for level in (1.0, -1.0))
    assert right < wrong


@pytest.mark.parametrize("kind", flaws.KINDS)
def test_the_packs_net_finds_a_flaw_in_eight_hundredths_of_the_pixels(kind: str) -> None:
    rows = torch.from_numpy(np.array(Image.open(CASES / f"{kind}.png"))).permute(2, 0, 1).float() / 255
    clean, flawed = (torch.stack(row.chunk(3, 2)) for row in rows.chunk(2, 1))
    quality = Quality(QualityNet.load(NET), "cpu")
    better, worse = (float(quality.score(views).mean()) for views in (clean, flawed))
    assert better > (0.3 if kind == "holes" else 0.6)  # which are in a rough airplane of DreamGaussian's
    assert better - worse > 0.15


def test_the_packs_net_is_small_and_named_as_published() -> None:
    assert sum(path.stat().st_size for path in NET.iterdir()) < 4 * 2**20
    with safe_open(NET / WEIGHTS, "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == {"backbone", "score_head"}  # noqa: SIM118
    card = json.loads((NET / "card.json").read_text())
    assert set(card["unseen_shapes"]) == set(results.UNSEEN)
    assert set(card["calibration_shapes"]) == set(results.CALIBRATION)
    assert all(card["quality"][f"{kind}_right"] >= 0.85 for kind in flaws.KINDS)
