"""Requests that run out of memory, and requests that are paused for others."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from generation.generators.base import Subject
from generation.pipeline import batch_limit
from generation.pipeline import pipeline as pipeline_module
from generation.pipeline.batch_limit import SUCCESSES_BEFORE_MORE
from generation.pipeline.pipeline import Asset, Pipeline
from generation.splats import ply
from tests.support.sculptor import Scene, Sculptor, align, ask, told
from tests.support.standins import Painter, WhiteIsBackground, colour_check


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
        waiting = pipeline.begin(ask("blue", seed=4), paused=lambda: bool(paused))
        alone = pipeline.generate([ask("blue", seed=4)])[0].ply
        pipeline.tick([waiting])
        paused.append(1)
        first = pipeline.begin(ask("red"))

        def full(subject: Subject) -> Scene:
            if waiting.work is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return begin(subject)

        monkeypatch.setattr(sculptor, "begin", full)
        while first.outcome is None:
            pipeline.tick([waiting, first])
        assert first.outcome.ply
        assert waiting.outcome is None
        paused.clear()
        while waiting.outcome is None:
            pipeline.tick([waiting])
        assert waiting.outcome.ply == alone


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
        remove, sizes = pipeline.background.remove, []

        def full(images: torch.Tensor) -> torch.Tensor:
            if len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(len(images))
            return remove(images)

        monkeypatch.setattr(pipeline.background, "remove", full)
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

    def test_a_splat_is_made_once_when_there_is_no_memory_to_check_it(self, pipeline, sculptor, monkeypatch):
        monkeypatch.setattr(batch_limit, "release_cache", lambda: None)  # takes half a second
        monkeypatch.setattr(pipeline_module, "release_cache", lambda: None)
        check_all = pipeline.self_check.check_all
        failed: list[int] = []

        def full(splats: Any, fit: bool) -> Any:
            if len(failed) < 4:  # both together, one as the half of them, each by itself
                failed.append(len(splats))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return check_all(splats, fit)

        monkeypatch.setattr(pipeline.self_check, "check_all", full)
        outcomes = pipeline.generate([ask("red", seed=seed) for seed in (1, 2)])
        assert failed == [2, 1, 1, 1]
        assert all(outcome.ply for outcome in outcomes)
        assert len(sculptor.begun_before) == 2

    def test_one_that_can_not_be_written_fails_alone(self, pipeline, sculptor, monkeypatch):
        write, errors = ply.write, [RuntimeError("can not be written"), torch.OutOfMemoryError("CUDA out of memory")]
        monkeypatch.setattr(ply, "write", lambda gaussians: write(gaussians) if not errors else raised(errors.pop(0)))
        unwritten, retried, other = pipeline.generate([ask("red", seed=seed) for seed in (1, 2, 3)])
        assert str(unwritten) == "can not be written"
        assert retried.ply
        assert other.ply
        assert len(sculptor.begun_before) == 3

    def test_a_generator_that_does_not_fit_beside_the_others_works_gets_their_memory(self, monkeypatch):
        monkeypatch.setattr(pipeline_module, "release_cache", lambda: None)  # takes half a second
        text, image = TakingTurns(iters=5), TakingTurns(iters=5)
        painter, matting = Painter(), WhiteIsBackground()
        pipeline = Pipeline(painter, matting, text, image, colour_check(), "cpu", [], 4, take_turns=True)  # type: ignore[arg-type]
        align(pipeline, monkeypatch, 0.9)
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste((0, 0, 255), (16, 16, 48, 48))
        jobs = [pipeline.begin(each) for each in (ask("red quick"), ask(None, image=picture), ask("red", seed=2))]
        image.is_full = lambda: jobs[2].work is not None and jobs[2].outcome is None
        for _ in range(100):
            if unfinished := [job for job in jobs if job.outcome is None]:
                pipeline.tick(unfinished)
        assert all(isinstance(job.outcome, Asset) and job.outcome.ply for job in jobs)
        assert len(text.begun_before) == 3  # one of them twice


class TakingTurns(Sculptor):
    """On the device for a while. What is quick is done after one tick."""

    is_full: Callable[[], bool] = staticmethod(lambda: False)

    def begin(self, subject: Subject) -> Scene:
        scene = super().begin(subject)
        scene.iters = 1 if "quick" in subject.words else self.iters
        return scene

    def offload(self) -> None:
        pass

    def onload(self) -> None:
        if self.is_full():
            raise torch.OutOfMemoryError("CUDA out of memory")


def raised(error: Exception) -> Any:
    raise error
