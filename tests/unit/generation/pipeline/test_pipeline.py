import io
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from generation.generators.base import CutoutFrame, NoSplat, Subject
from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.kinds import KINDS, Kind
from generation.pipeline import assemble
from generation.pipeline.batch_limit import SUCCESSES_BEFORE_MORE
from generation.pipeline.pipeline import Asset, Cancelled, Pipeline, Request
from generation.settings import CONFIGS, Settings
from generation.splats import ply
from generation.stages.self_check import views
from generation.weights import WeightsError
from tests.support.standins import COLOURS, Painter, WhiteIsBackground, ball, colour_check

GUIDED = CONFIGS / "tiny_mv_fast.yaml"  # has MVDream, and is DreamGaussian's
STAGES = ["text_to_image", "background", "clay", "self_check"]


class Scene:
    """Becomes a ball of the cut-out's colour in the given number of steps."""

    def __init__(self, cutout: torch.Tensor, prompt: str, seed: int, iters: int) -> None:
        self.cutout, self.prompt, self.seed, self.iters = cutout, prompt, seed, iters
        self.iteration = 0

    @property
    def fraction(self) -> float:
        return self.iteration / self.iters

    @property
    def done(self) -> bool:
        return self.iteration >= self.iters

    def gaussians(self):
        if "shapeless" in self.prompt:
            raise NoSplat("clay: it has no shape")
        middle = self.cutout[:3, 32, 32]
        colour = next(name for name, value in COLOURS.items() if torch.allclose(torch.tensor(value), middle, atol=0.1))
        return ball(colour, count=100 if "sparse" in self.prompt else 8000, seed=self.seed)


class Sculptor:
    """A generator. Some prompts make it fail, alone or with all that share a tick."""

    name = "clay"
    cutout = CutoutFrame(64, 0.2)

    def __init__(self, iters: int) -> None:
        self.iters = iters
        self.batches: list[int] = []
        self.read_together: list[list[str]] = []
        self.begun_before: list[bool] = []

    def picture_prompt(self, words: str) -> str:
        return words

    def encode(self, texts: list[str]) -> None:
        self.read_together.append(texts)
        if any("unreadable" in text for text in texts):
            raise ValueError("not words")

    def truncation(self, words: str) -> dict[str, tuple[int, int]]:
        return {"mvdream": (2, 4)} if "epic" in words else {}

    def prefetch(self, words: str, seed: int) -> list[tuple[str, int]]:
        return [(words, seed)]

    def begin(self, subject: Subject) -> Scene:
        assert subject.cutout is not None
        assert subject.cutout.shape == (4, 64, 64)
        self.begun_before.append(subject.prefetched is not None)
        if subject.prefetched is not None:
            assert subject.prefetched.pop() == (subject.words, subject.seed)  # can be used once
        if "unstartable" in subject.words:
            raise RuntimeError("no clay")
        if "unreadable" in subject.words:
            raise ValueError("not words")
        return Scene(subject.cutout, subject.words, subject.seed, self.iters)

    def tick(self, scenes: list[Scene]) -> None:
        self.batches.append(len(scenes))
        for scene in scenes:
            scene.iteration += 1
            if "collapse" in scene.prompt and scene.iteration == 2:
                raise RuntimeError("it fell over")


@pytest.fixture(autouse=True)
def small_views(monkeypatch):
    """A sixteenth of the validators' pixels: what is tested here does not depend on them."""
    monkeypatch.setattr(views, "VIEW_SIZE", 130)


@pytest.fixture
def sculptor() -> Sculptor:
    return Sculptor(iters=5)


@pytest.fixture
def pipeline(sculptor) -> Pipeline:
    painter: Any = Painter()
    matting: Any = WhiteIsBackground()
    return Pipeline(painter, matting, sculptor, sculptor, colour_check(), "cpu", [], 4)


def ask(prompt: str | None, seed: int = 1, **more) -> Request:
    return Request(**{"prompt": prompt, "seed": seed, "threshold": 0.6, **more})


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


def test_same_prompt_and_seed_same_splat(pipeline):
    alone = pipeline.generate([ask("a red ball", seed=3)])[0].ply
    torch.manual_seed(5)
    together = pipeline.generate([ask("a blue ball", seed=4), ask("a red ball", seed=3)])
    assert together[1].ply == alone
    assert pipeline.generate([ask("a red ball", seed=4)])[0].ply != alone


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


def told(seen: list[Any], what: Any, result: Any) -> Any:
    """``result``, and ``what`` is seen."""
    seen.append(what)
    return result


class TestPausing:
    def test_it_keeps_what_it_has_and_goes_on_from_there(self, pipeline, sculptor, monkeypatch):
        alone = [asset.ply for asset in pipeline.generate([ask("red", seed=1), ask("blue", seed=2)])]
        paint, begin = Painter.paint, sculptor.begin
        painted: list[str] = []
        paused: list[int] = []
        monkeypatch.setattr(Painter, "paint", lambda self, prompt: told(painted, prompt, paint(self, prompt)))
        # Somebody else comes while the first of two works is begun.
        monkeypatch.setattr(sculptor, "begin", lambda subject: told(paused, 1, begin(subject)))
        sculptor.batches.clear()
        seen: list[str] = []
        jobs = [
            pipeline.begin(ask(prompt, seed=seed), lambda stage, _: seen.append(stage), paused=lambda: len(paused) == 1)
            for prompt, seed in (("red", 1), ("blue", 2))
        ]
        for _ in range(3):
            pipeline.tick(jobs)
        assert [job.work is None for job in jobs] == [False, True]
        assert not sculptor.batches
        assert seen[-1] == "paused"
        paused.append(1)
        while unfinished := [job for job in jobs if job.outcome is None]:
            pipeline.tick(unfinished)
        assert [job.outcome.ply for job in jobs] == alone
        assert painted == ["red", "blue"]

    def test_its_report_has_no_time_in_which_it_was_paused(self, pipeline, monkeypatch):
        now = SimpleNamespace(seconds=0.0)
        monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
        paused: list[int] = []
        job = pipeline.begin(ask("red"), paused=lambda: bool(paused))
        pipeline.tick([job])
        paused.append(1)
        for _ in range(3):
            now.seconds += 100
            pipeline.tick([job])
        paused.clear()
        now.seconds += 100
        while job.outcome is None:
            now.seconds += 1
            pipeline.tick([job])
        assert job.report.total_seconds == 100 + 4  # 100 until it began to rest

    def test_memory_that_it_keeps_is_given_up_for_what_goes_before(self, pipeline, sculptor, monkeypatch):
        begin = sculptor.begin
        paused: list[int] = []
        resting = pipeline.begin(ask("blue", seed=4), paused=lambda: bool(paused))
        alone = pipeline.generate([ask("blue", seed=4)])[0].ply
        pipeline.tick([resting])
        paused.append(1)
        first = pipeline.begin(ask("red"))

        def full(subject: Subject) -> Scene:
            if resting.work is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return begin(subject)

        monkeypatch.setattr(sculptor, "begin", full)
        while first.outcome is None:
            pipeline.tick([resting, first])
        assert first.outcome.ply
        assert resting.outcome is None
        paused.clear()
        while resting.outcome is None:
            pipeline.tick([resting])
        assert resting.outcome.ply == alone


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


class TestFullMemory:
    """A GPU's memory is played by an error above a number of requests at once."""

    def test_works_begin_again_fewer_at_once(self, pipeline, sculptor, monkeypatch):
        tick = sculptor.tick

        def full(scenes: list[Scene]) -> None:
            if len(scenes) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            tick(scenes)

        monkeypatch.setattr(sculptor, "tick", full)
        alone = pipeline.generate([ask("red", seed=1)])[0].ply
        outcomes = pipeline.generate([ask("red", seed=seed) for seed in (1, 2, 3, 4)])
        assert all(outcome.ply for outcome in outcomes)
        assert outcomes[0].ply == alone
        assert pipeline.limit.current == 2
        assert max(sculptor.batches) == 2

    def test_one_that_waits_lets_go_of_those_that_are_done(self, pipeline):
        first, second, waiting = (pipeline.begin(ask("red", seed=seed)) for seed in (1, 2, 3))
        waiting.waits_for = [first, second]
        first.outcome = Asset(b"ply", first.report)
        assert waiting.is_waiting
        assert waiting.waits_for == [second]
        second.outcome = RuntimeError("it fell over")
        assert not waiting.is_waiting
        assert not waiting.waits_for

    def test_only_requests_that_come_to_a_result_let_more_run_at_once(self, pipeline):
        pipeline.limit.out_of_memory(4)
        for _ in range(SUCCESSES_BEFORE_MORE):
            pipeline.generate([ask("red collapse")])  # each has begun a work
        pipeline.generate([ask("red", seed=seed) for seed in range(SUCCESSES_BEFORE_MORE - 1)])
        assert pipeline.limit.current == 2
        pipeline.generate([ask("red")])
        assert pipeline.limit.current == 3

    def test_pictures_are_made_fewer_at_once_and_works_are_not(self, pipeline, sculptor, monkeypatch):
        remove, sizes = pipeline._background.remove, []

        def full(images: torch.Tensor) -> torch.Tensor:
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(len(images))
            return remove(images)

        monkeypatch.setattr(pipeline._background, "remove", full)
        outcomes = pipeline.generate([ask("red", seed=seed) for seed in (1, 2, 3)])
        assert all(outcome.ply for outcome in outcomes)
        assert sizes == [1, 1, 1]
        assert pipeline.limit.current == 4
        assert max(sculptor.batches) == 3

    def test_one_that_does_not_fit_beside_others_is_made_after_them(self, pipeline, sculptor, monkeypatch):
        begin, tries, others = sculptor.begin, [], [ask("red", seed=seed) for seed in (1, 2)]
        finished: list[Any] = []

        def full(subject: Subject) -> Scene:
            if subject.words == "red large":
                tries.append(len(finished))
                if len(finished) < len(others):
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return begin(subject)

        monkeypatch.setattr(sculptor, "begin", full)
        jobs = [pipeline.begin(request) for request in (others[0], ask("red large", seed=3), others[1])]
        while unfinished := [job for job in jobs if job.outcome is None]:
            pipeline.tick(unfinished)
            finished = [job for job in jobs if job.outcome is not None]
        assert all(job.outcome.ply for job in jobs)
        assert tries == [0, 2]

    def test_several_that_do_not_fit_are_made_one_after_the_other(self, pipeline, sculptor, monkeypatch):
        tick = sculptor.tick

        def full(scenes: list[Scene]) -> None:
            if len([job for job in jobs if job.work is not None and job.outcome is None]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            tick(scenes)

        monkeypatch.setattr(sculptor, "tick", full)
        pipeline.limit.current = 1  # each is stepped by itself, with the other's scene in memory
        jobs = [pipeline.begin(ask("red", seed=seed)) for seed in (1, 2)]
        for _ in range(100):
            if unfinished := [job for job in jobs if job.outcome is None]:
                pipeline.tick(unfinished)
        assert all(job.outcome.ply for job in jobs)

    def test_one_that_does_not_fit_by_itself_fails_alone(self, pipeline, sculptor, monkeypatch):
        begin = sculptor.begin

        def full(subject: Subject) -> Scene:
            if "huge" in subject.words:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return begin(subject)

        monkeypatch.setattr(sculptor, "begin", full)
        huge, small = pipeline.generate([ask("red huge"), ask("red")])
        assert isinstance(huge, torch.OutOfMemoryError)
        assert small.ply
        assert pipeline.generate([ask("red")])[0].ply


def align(pipeline, monkeypatch, score: float) -> None:
    """Let every splat agree with its prompt to this degree."""
    monkeypatch.setattr(pipeline._self_check, "_align", lambda views, prompts: [(score, [0.1] * 16) for _ in prompts])


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

    def test_the_threshold_itself_passes(self, pipeline, monkeypatch):
        align(pipeline, monkeypatch, 0.6)
        (asset,) = pipeline.generate([ask("red")])
        assert asset.ply
        assert asset.report.rejected is None


class TestImagePrompts:
    def test_skip_text_to_image_and_guide_without_words(self, pipeline, sculptor, monkeypatch):
        prompts: list[str] = []
        begin = sculptor.begin
        monkeypatch.setattr(sculptor, "begin", lambda subject: told(prompts, subject.words, begin(subject)))
        picture = Image.new("RGB", (90, 60), "white")
        picture.paste((0, 0, 255), (20, 10, 70, 50))
        (asset,) = pipeline.generate([ask(None, image=picture)])
        assert asset.report.score > 0.9
        assert prompts == [""]

    def test_what_a_validator_opens_is_compared(self, pipeline):
        """Where the picture is upright only with its metadata, say, that is not what validators look at."""
        picture, target = Image.new("RGB", (90, 60), "white"), Image.new("RGB", (90, 60), "white")
        picture.paste((0, 0, 255), (20, 10, 70, 50))
        target.paste((255, 0, 0), (20, 10, 70, 50))
        (asset,) = pipeline.generate([ask(None, image=picture, target=target)])
        assert asset.report.score < 0.6
        assert asset.ply == b""
        (asset,) = pipeline.generate([ask(None, image=target, target=target)])
        assert asset.report.score > 0.9

    def test_what_the_sender_cut_out_is_not_matted(self, pipeline, sculptor, monkeypatch):
        """White on white, and half as transparent as glass: the alpha says where it is."""
        cutouts: list[torch.Tensor] = []
        begin = sculptor.begin
        monkeypatch.setattr(sculptor, "begin", lambda subject: told(cutouts, subject.cutout, begin(subject)))
        monkeypatch.setattr(pipeline._background, "remove", None)
        monkeypatch.setattr(Scene, "gaussians", lambda scene: ball())
        for alpha in (255, 60):
            picture = Image.new("RGBA", (90, 60), (255, 0, 0, 0))
            picture.paste((250, 250, 250, alpha), (20, 10, 70, 50))
            picture.putpixel((5, 5), (0, 0, 0, alpha // 4))  # what is left of a shadow
            pipeline.generate([ask(None, image=picture)])
            (cutout,) = cutouts
            cutouts.clear()
            rows, columns = torch.nonzero(cutout[3] > alpha / 510, as_tuple=True)
            assert (int(columns.max() - columns.min()) + 1, int(rows.max() - rows.min()) + 1) == (51, 41)
            assert torch.allclose(cutout[3, 32, 32], torch.tensor(alpha / 255))
            assert torch.allclose(cutout[:3, 32, 32], torch.tensor(250 / 255))

    def test_cut_out_pictures_and_others_go_together(self, pipeline):
        opaque = Image.new("RGBA", (90, 60), "white")
        opaque.paste((0, 0, 255), (20, 10, 70, 50))
        cut_out = Image.new("RGBA", (90, 60))
        cut_out.paste((255, 0, 0), (20, 10, 70, 50))
        first, second, third = pipeline.generate([ask(None, image=opaque), ask(None, image=cut_out), ask("green")])
        assert first.report.score > 0.9
        assert second.ply
        assert third.ply

    def test_nothing_in_it_is_told_before_anything_is_optimised(self, pipeline, sculptor):
        for picture in (Image.new("RGBA", (40, 40)), Image.new("RGB", (40, 40), "white")):
            (asset,) = pipeline.generate([ask(None, image=picture)])
            assert asset.ply == b""
            assert asset.report.hopeless
        assert sculptor.batches == []


class TestStopping:
    def test_cancelled_between_ticks(self, pipeline, sculptor):
        cancelled = lambda index: index == 1 and len(sculptor.batches) >= 2  # noqa: E731
        kept, dropped = pipeline.generate([ask("red"), ask("blue")], cancelled=cancelled)
        assert isinstance(dropped, Cancelled)
        assert kept.ply
        assert sculptor.batches == [2, 2, 1, 1, 1]

    def test_cancelled_between_stages(self, pipeline, sculptor):
        seen = []
        (outcome,) = pipeline.generate(
            [ask("red")], lambda index, stage, fraction: seen.append(stage), lambda index: "background" in seen
        )
        assert isinstance(outcome, Cancelled)
        assert sculptor.batches == []

    def test_deadline(self, pipeline, sculptor):
        late, fine = pipeline.generate([ask("red", deadline=time.monotonic() - 1), ask("red")])
        assert isinstance(late, TimeoutError)
        assert fine.ply


def test_progress(pipeline):
    seen = []
    pipeline.generate([ask("red")], lambda *event: seen.append(event))
    assert [stage for _, stage, _ in seen if stage != "clay"] == ["text_to_image", "background", "self_check"]
    fractions = [fraction for _, stage, fraction in seen if stage == "clay"]
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


def test_load_announces_and_names_every_model(mini_models, no_network, monkeypatch, sculptor):
    made = []

    def load(options, parts):
        guidance = parts.load("mvdream", lambda checkpoint: checkpoint)
        assert (guidance.folder / "unet" / "config.json").is_file()
        assert (guidance.device, guidance.dtype, guidance.entry.use) == ("cpu", torch.float32, None)
        assert parts.remove_background(torch.rand(4, 3, 32, 32)).shape == (4, 1, 32, 32)
        made.append(options)
        return sculptor

    monkeypatch.setitem(KINDS, "dreamgaussian", Kind(DreamGaussianOptions, "tests:load"))
    monkeypatch.setattr("tests.load", load, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = Settings.resolve({"profile": "tiny", "models": mini_models, "config": GUIDED})
    told: list[str] = []
    pipeline = assemble.load(settings, told.append)
    assert made == [settings.options]  # one for texts and pictures, whose options are the same
    assert sum(line.startswith("loading") for line in told) == 4
    assert "rasteriser" in told[-1]
    keys = ("stage", "name", "licence", "precision", "device")
    assert [tuple(model[key] for key in keys) for model in pipeline.models] == [
        (stage, f"mini-{folder}", "MIT", "float32", "cpu")
        for stage, folder in zip(
            ["text_to_image", "background", "mvdream", "clip"], ["flux", "background", "mvdream", "clip"], strict=True
        )
    ]
    monkeypatch.setattr(sculptor, "begin", lambda subject: Scene(torch.ones(4, 64, 64), subject.words, subject.seed, 5))
    monkeypatch.setattr(Scene, "gaussians", lambda scene: ball(seed=scene.seed))
    monkeypatch.setattr(pipeline._background, "remove", lambda images: torch.ones_like(images[:, :1]))
    (asset,) = pipeline.generate([ask("a red cube", threshold=0.0)])
    assert isinstance(asset, Asset)
    assert asset.ply
    assert list(asset.report.seconds) == STAGES


def test_load_without_weights_says_which(tmp_path, mini_models, monkeypatch):
    models = tmp_path / "models.yaml"
    text = mini_models.read_text().replace("./mvdream", "mvdream-sd2.1")
    models.write_text(text.replace("./", f"{mini_models.parent}/"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"mvdream-sd2\.1 is not on this machine; get it: .*--only mvdream"):
        assemble.load(Settings.resolve({"profile": "tiny", "models": models, "config": GUIDED}))


@pytest.mark.slow
def test_real_classes_end_to_end(mini_models, no_network, tmp_path, caplog):
    """Every stage's real class with random weights: the way is right, whatever the outcome says."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "iters: 3\nref_size: 64\nrender_size: 64\nnum_pts: 7500\ninit: ball\ndensity_start_iter: 100\n"
        "densification_interval: 100"
    )
    pipeline = assemble.load(Settings.resolve({"profile": "tiny", "models": mini_models, "config": config}))
    pipeline._warm_up_batches()  # what only a GPU needs runs anywhere
    # A random matting net answers about one half everywhere: make it see the whole picture as the object.
    matting: Any = SimpleNamespace(remove=lambda images: torch.ones_like(images[:, :1]))
    pipeline._background = matting
    with caplog.at_level(logging.INFO):
        first, second = pipeline.generate([ask("a red cube", threshold=0.0), ask("a red cube", threshold=0.0)])
    assert isinstance(first, Asset), first
    assert isinstance(second, Asset), second
    assert first.report.num_gaussians > 0
    assert list(first.report.seconds) == [*STAGES[:2], "dreamgaussian", STAGES[3]]
    assert first.ply == second.ply
    assert "red cube" not in caplog.text


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
