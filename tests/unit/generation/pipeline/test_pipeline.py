import io
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.pipeline.pipeline import Asset, Cancelled, Pipeline
from generation.splats import ply
from tests.support.sculptor import STAGES, Scene, align, ask, told
from tests.support.standins import Painter, WhiteIsBackground, ball, colour_check


def test_a_prompt_becomes_a_checked_splat(pipeline):
    (asset,) = pipeline.generate([ask("a red ball", seed=7)])
    report = asset.report
    assert (report.seed, report.rejected, report.num_gaussians) == (7, None, 8000)
    assert report.score > 0.9
    assert list(report.seconds) == STAGES
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert all(gate.passed for gate in report.gates.values())
    delivered = ply.read(asset.ply)
    assert torch.equal(delivered.means, asset.gaussians.means)
    side = (delivered.means.amax(0) - delivered.means.amin(0)).max()
    assert float(side) == pytest.approx(1.5, rel=1e-4)  # in the validators' frame


def test_the_time_of_a_pause_is_not_the_request_s(pipeline, monkeypatch):
    now = [10.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    monkeypatch.setattr("generation.pipeline.job.time", clock)
    job = pipeline.begin(ask("red"))
    job.work_began = 8.0
    job.pause()
    now[0] = 13.0
    job.pause()  # still
    now[0] = 20.0
    job.resume()
    assert job.work_began == 18.0


def test_same_prompt_and_seed_same_splat(pipeline):
    alone = pipeline.generate([ask("a red ball", seed=3)])[0].ply
    torch.manual_seed(5)
    together = pipeline.generate([ask("a blue ball", seed=4), ask("a red ball", seed=3)])
    assert together[1].ply == alone
    assert pipeline.generate([ask("a red ball", seed=4)])[0].ply != alone


def test_each_picture_is_drawn_with_its_own_requests_seed(pipeline, monkeypatch):
    drawn: list[list[tuple[str, int]]] = []
    paint = pipeline.text_to_image.generate
    monkeypatch.setattr(
        pipeline.text_to_image,
        "generate",
        lambda texts, seeds: told(drawn, list(zip(texts, seeds, strict=True)), paint(texts, seeds)),
    )
    pipeline.generate([ask("red", seed=3), ask("blue", seed=4)])
    assert drawn == [[("red", 3), ("blue", 4)]]


def test_works_share_their_ticks(pipeline, sculptor):
    pipeline.generate([ask("red"), ask("green"), ask("blue")])
    assert sculptor.batches == [3] * 5
    assert sculptor.read_together[0] == ["red", "green", "blue"]
    assert sculptor.begun_before == [True] * 3  # while they were drawn


def test_a_prompt_that_can_not_be_read_fails_alone(pipeline):
    red, unreadable, blue = pipeline.generate([ask("red"), ask("unreadable green"), ask("blue")])
    assert isinstance(unreadable, ValueError)
    assert red.ply
    assert blue.ply


def test_a_request_may_join_while_others_are_on_their_way(pipeline, sculptor):
    alone = pipeline.generate([ask("blue", seed=4)])[0].ply
    sculptor.batches.clear()
    first = pipeline.begin(ask("red"))
    for _ in range(2):
        pipeline.tick([first])
    second = pipeline.begin(ask("blue", seed=4))
    while second.outcome is None:
        pipeline.tick([job for job in (first, second) if job.outcome is None])
    assert sculptor.batches == [1, 1, 2, 2, 2, 1, 1]
    assert first.outcome.report.rejected is None
    assert second.outcome.ply == alone


def test_a_failure_is_its_requests_own(pipeline):
    outcomes = pipeline.generate(
        [ask("red"), ask("explode"), ask("red unstartable"), ask("red collapse"), ask("a blue ball")]
    )
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "Asset", "RuntimeError", "RuntimeError", "RuntimeError", "Asset",
    ]  # fmt: skip
    assert [str(outcome) for outcome in outcomes[1:4]] == ["out of paint", "no clay", "it fell over"]
    assert outcomes[0].report.rejected is None
    assert outcomes[4].report.rejected is None


def test_a_neighbours_failure_leaves_no_trace(pipeline):
    alone = pipeline.generate([ask("red", seed=9)])[0].ply
    assert pipeline.generate([ask("red", seed=9), ask("red collapse")])[0].ply == alone


class TestRejections:
    def reject(self, pipeline, prompt: str, **more):
        (asset,) = pipeline.generate([ask(prompt, **more)])
        assert asset.ply == b""
        return asset.report

    def test_nothing_in_the_image(self, pipeline):
        report = self.reject(pipeline, "a white void")
        assert "no object" in report.rejected
        assert report.score is None
        assert list(report.seconds) == ["text_to_image", "background"]

    def test_what_no_splat_can_be_made_of(self, pipeline):
        report = self.reject(pipeline, "red and shapeless")
        assert report.rejected == "clay: it has no shape"
        assert not report.hopeless  # another seed may give it one
        assert report.score is None
        assert list(report.seconds) == STAGES[:3]

    def test_a_gate(self, pipeline):
        report = self.reject(pipeline, "red sparse")
        assert report.rejected == "min_gaussians: 100 Gaussians are under the limit of 7000"
        assert report.score is None
        assert report.num_gaussians == 100
        assert not report.gates["min_gaussians"].passed

    def test_a_low_score(self, pipeline, monkeypatch):
        align(pipeline, monkeypatch, 0.419)
        report = self.reject(pipeline, "red")
        assert report.rejected == "score 0.41 (alignment 0.42) is under the threshold 0.60"
        assert report.score == report.parts["alignment"] == 0.419

    def test_an_alignment_that_makes_the_score_0(self, pipeline, monkeypatch):
        align(pipeline, monkeypatch, 0.299)
        report = self.reject(pipeline, "red")
        assert report.rejected == "score 0.00 (alignment 0.30): an alignment under 0.30 makes it 0"

    def test_a_score_is_told_up_to_1(self, pipeline, monkeypatch):
        """As a validator's feedback has it: an alignment may be over 1."""
        align(pipeline, monkeypatch, 1.1)
        (asset,) = pipeline.generate([ask("red")])
        assert (asset.report.score, asset.report.parts["alignment"]) == (1.0, 1.1)

    def test_the_threshold_itself_passes(self, pipeline, monkeypatch):
        align(pipeline, monkeypatch, 0.6)
        (asset,) = pipeline.generate([ask("red")])
        assert asset.ply
        assert asset.report.rejected is None


def finish(pipeline, *jobs):
    """The jobs' outcomes."""
    while unfinished := [job for job in jobs if job.outcome is None]:
        pipeline.tick(unfinished)
    return [job.outcome for job in jobs]


class TestStopping:
    def test_cancelled_between_ticks(self, pipeline, sculptor):
        stopped = pipeline.begin(ask("blue"), cancelled=lambda: len(sculptor.batches) >= 2)
        kept, dropped = finish(pipeline, pipeline.begin(ask("red")), stopped)
        assert isinstance(dropped, Cancelled)
        assert kept.ply
        assert sculptor.batches == [2, 2, 1, 1, 1]

    def test_cancelled_between_stages(self, pipeline, sculptor):
        seen = []
        job = pipeline.begin(ask("red"), lambda stage, fraction: seen.append(stage), lambda: "background" in seen)
        (outcome,) = finish(pipeline, job)
        assert isinstance(outcome, Cancelled)
        assert sculptor.batches == []

    def test_deadline(self, pipeline, sculptor):
        late, fine = pipeline.generate([ask("red", deadline=time.monotonic() - 1), ask("red")])
        assert isinstance(late, TimeoutError)
        assert fine.ply


def test_progress(pipeline):
    seen = []
    finish(pipeline, pipeline.begin(ask("red"), lambda *event: seen.append(event)))
    assert [stage for stage, _ in seen if stage != "clay"] == ["text_to_image", "background", "self_check"]
    fractions = [fraction for stage, fraction in seen if stage == "clay"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


class TestPreviews:
    @pytest.fixture(autouse=True)
    def visible(self, sculptor, monkeypatch):
        monkeypatch.setattr(Scene, "so_far", Scene.gaussians, raising=False)

    @pytest.mark.parametrize("preview", [True, False])
    def test_they_are_told_to_who_asks(self, pipeline, preview):
        told = []
        job = pipeline.begin(ask("a red ball", watched=preview), lambda *said: told.append(said))
        while job.outcome is None:
            pipeline.tick([job])
        pictures = [said for said in told if len(said) == 3]
        assert [stage for stage, _, _ in pictures] == (["text_to_image"] + ["clay"] * 4 if preview else [])
        for _, _, data in pictures:
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            assert max(picture.size) <= 128
            middle = picture.getpixel((picture.width // 2, picture.height // 2))
            assert isinstance(middle, tuple)
            red, green, _ = middle
            assert red > 150 > 60 > green

    @pytest.mark.parametrize("watched", [True, False])
    def test_what_is_rejected_comes_to_who_watches(self, pipeline, monkeypatch, watched):
        align(pipeline, monkeypatch, 0.3)
        low, few = pipeline.generate([ask("a red ball", watched=watched), ask("a sparse red ball", watched=watched)])
        assert low.report.rejected.startswith("score 0.3")
        assert "7000" in few.report.rejected
        for outcome, count in ((low, 8000), (few, 100)):
            assert len(ply.read(outcome.ply)) == count if watched else outcome.ply == b""

    def test_one_that_can_not_be_made_is_left_out(self, pipeline, monkeypatch):
        monkeypatch.setattr(Scene, "so_far", lambda scene: 1 / 0)
        (outcome,) = pipeline.generate([ask("a red ball", watched=True)])
        assert isinstance(outcome, Asset)
        assert outcome.ply


class TestValidate:
    def test_scores_a_splat_of_any_size(self, pipeline):
        good = ply.write(ball("red", radius=7))
        scores = pipeline.validate(good, "a red ball")
        assert scores.score == scores.alignment_score > 0.9
        assert scores.ssim is not None
        assert scores.ssim > 0.9
        assert scores.iqa is None
        assert scores.lpips is None
        assert pipeline.validate(good, "a blue ball").score == 0

    def test_low_alignment_counts_as_nothing(self, pipeline, monkeypatch):
        align(pipeline, monkeypatch, 0.29)
        scores = pipeline.validate(ply.write(ball()), "red")
        assert (scores.score, scores.alignment_score) == (0, 0.29)

    def test_previews(self, pipeline):
        good = ply.write(ball("red"))
        scores = pipeline.validate(good, "a red ball", single=True, grid=True, above=0.6)
        sizes = [Image.open(io.BytesIO(png)).size for png in (scores.preview, scores.grid_preview)]
        assert sizes == [(130, 130), (265, 265)]  # a gap of 5 pixels
        for hidden in (
            pipeline.validate(good, "a red ball"),
            pipeline.validate(good, "a red ball", True, True, above=scores.score),
            pipeline.validate(good, "a blue ball", True, True),
            pipeline.validate(ply.write(ball(count=10)), "a red ball", True, True, above=-1.0),
        ):
            assert hidden.preview is hidden.grid_preview is None

    def test_a_failed_gate_is_zero(self, pipeline):
        scores = pipeline.validate(ply.write(ball(count=10)), "red")
        assert (scores.score, scores.alignment_score, scores.ssim, scores.iqa) == (0, 0, 0, None)
        assert not scores.gates["min_gaussians"].passed

    @pytest.mark.parametrize("data", [b"", b"ply\nnonsense"])
    def test_not_a_ply(self, pipeline, data):
        with pytest.raises(ValueError, match="PLY"):
            pipeline.validate(data, "red")

    def test_image_prompt(self, pipeline):
        picture = Image.new("RGB", (60, 60), "white")
        picture.paste((255, 0, 0), (15, 15, 45, 45))
        assert pipeline.validate(ply.write(ball("red")), picture).score > 0.9


class TestWords:
    def test_text_to_image_is_asked_by_the_template(self, sculptor, monkeypatch):
        painter: Any = Painter()
        matting: Any = WhiteIsBackground()
        asked: list[str] = []

        def generate(prompts: list[str], seeds: list[int]) -> list[torch.Tensor]:
            asked.extend(prompts)
            return [painter.paint("red")]

        monkeypatch.setattr(painter, "generate", generate)
        options = DreamGaussianOptions(elevation=-20, prompt_template="a {prompt}, {view}")
        monkeypatch.setattr(sculptor, "picture_prompt", options.picture_prompt)
        pipeline = Pipeline(painter, matting, sculptor, sculptor, colour_check(), "cpu", [], 1)
        pipeline.generate([ask("red {view} ball")])
        assert asked == ["a red {view} ball, front view from slightly above"]
        assert painter.asked == asked[0]

    def test_a_text_that_is_cut_is_told_with_how_much(self, pipeline, caplog):
        with caplog.at_level(logging.WARNING, "generation.pipeline.pipeline"):
            short, long = pipeline.generate([ask("a red ball"), ask("an epic red ball" + " of clay" * 8, seed=5)])
        assert short.report.text_cut == {}
        assert long.report.text_cut == {"text_to_image CLIP": (2, 3), "mvdream": (2, 4), "self_check": (12, 22)}
        (record,) = caplog.records
        words = (
            "The prompt is cut (seed 5), tokens read: text_to_image CLIP 2 of 3, mvdream 2 of 4, self_check 12 of 22"
        )
        assert record.getMessage() == words
