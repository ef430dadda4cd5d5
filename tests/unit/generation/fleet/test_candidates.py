"""Several candidates of one request, in virtual time, around an engine of so many places."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from PIL import Image

from generation.engine.engine import StageFailed, Unavailable
from generation.fleet.candidates import LOOK_S, STAGE, Candidates, merit, seed_of
from generation.schema.results import Asset, Report, Request
from scripts.bench import virtual_time

SEED = 2**32 - 5


class Engine:
    """`scores` are by the number of a candidate; an exception is what it fails with. `seconds` is what one takes."""

    def __init__(self, places: int = 4, seconds: float = 2.0, scores: dict[int, Any] | None = None) -> None:
        self.places, self.seconds, self.scores = places, seconds, scores or {}
        self.begun: list[Request] = []
        self.cancelled = 0
        self.running = self.most = self.waiting = 0

    def spare(self, background: bool) -> int:
        return 0 if self.waiting else max(0, self.places - self.running - (self.places > 1))

    async def generate(self, request: Request, on_progress: Any = None) -> Asset:
        self.begun.append(request)
        number = next(number for number in range(64) if seed_of(SEED, number) == request.seed)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if on_progress is not None:
            on_progress("dreamgaussian", 1.0)
        score = self.scores.get(number, 0.5)
        if isinstance(score, Exception):
            raise score
        rejected = None if score is not None and score >= request.threshold else "too low"
        splat = b"" if rejected else f"splat {number}".encode()
        return Asset(splat, Report(request.seed, score=score, rejected=rejected, num_gaussians=9000))


def of(candidates: int, budget: float | None = None, **more: Any) -> Request:
    values: dict[str, Any] = {"prompt": "a red cube", "seed": SEED, "threshold": 0.6, "background": True} | more
    return Request(**values, candidates=candidates, budget_seconds=budget)


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return virtual_time.run(main())  # type: ignore[arg-type]


def best(engine: Engine, request: Request, on_progress: Any = None) -> tuple[Asset, float]:
    async def main() -> tuple[Asset, float]:
        began = asyncio.get_running_loop().time()
        asset = await Candidates(engine).generate(request, on_progress)
        return asset, asyncio.get_running_loop().time() - began

    return run(main)


def test_seeds_differ_and_the_first_is_the_requests_own() -> None:
    seeds = [seed_of(SEED, number) for number in range(64)]
    assert seeds[0] == SEED
    assert len(set(seeds)) == 64
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_one_candidate_is_the_engines_own_answer() -> None:
    engine = Engine(scores={0: 0.7})
    request = of(1)
    asset, _ = best(engine, request)
    assert (asset.ply, asset.report.candidates) == (b"splat 0", [])
    assert engine.begun == [request]


def test_the_best_is_returned_with_all_scores() -> None:
    engine = Engine(scores={0: 0.7, 1: 0.4, 2: 0.9, 3: None, 4: 0.8})
    asset, seconds = best(engine, of(5))
    assert (asset.ply, asset.report.seed) == (b"splat 2", seed_of(SEED, 2))
    assert [score for _, score in asset.report.candidates] == [0.7, 0.4, 0.9, None, 0.8]
    assert [seed for seed, _ in asset.report.candidates] == [seed_of(SEED, number) for number in range(5)]
    assert engine.most == 3  # of four places: one is for the next request
    assert seconds < 2 * engine.seconds + 1
    assert all((each.candidates, each.budget_seconds) == (1, None) for each in engine.begun)


def test_at_the_limit_of_the_score_what_it_is_made_of_decides() -> None:
    def report(score: float | None, alignment: float) -> Report:
        return Report(1, score=score, parts={"iqa": 1.0, "alignment": alignment, "ssim": 0.95, "lpips": 0.95})

    assert merit(report(1.0, 1.3)) > merit(report(1.0, 1.2)) > 1.0
    assert merit(report(0.9, 0.8)) == 0.9
    assert merit(report(None, 0.8)) == -1.0
    assert merit(Report(1, score=1.0)) == 1.0


def test_of_rejected_ones_the_best_score_is_told() -> None:
    asset, _ = best(Engine(scores={0: 0.2, 1: 0.5, 2: None}), of(3))
    assert (asset.ply, asset.report.score, asset.report.rejected) == (b"", 0.5, "too low")


def test_the_budgets_end_returns_the_best_so_far() -> None:
    engine = Engine(places=1, scores={1: 0.9, 3: 1.0})
    asset, seconds = best(engine, of(64, budget=5.0))
    assert asset.ply == b"splat 1"
    assert seconds <= 5.0
    assert len(engine.begun) == 2  # a third one would not have been done in time


def test_what_the_first_one_waited_is_no_measure_of_the_others() -> None:
    engine = Engine(places=1, seconds=6.0, scores={0: 0.7})
    made = engine.generate

    async def generate(request: Request, on_progress: Any = None) -> Asset:
        engine.seconds = 6.0 if request.seed == SEED else 1.0
        return await made(request, on_progress)

    engine.generate = generate  # type: ignore[method-assign]
    best(engine, of(64, budget=14.0))
    assert len(engine.begun) >= 8


def test_a_candidate_that_takes_too_long_is_given_up_for_the_one_that_is_there() -> None:
    engine = Engine(places=4, seconds=2.0, scores={0: 0.7})
    slow = engine.generate

    async def generate(request: Request, on_progress: Any = None) -> Asset:
        engine.seconds = 2.0 if request.seed == SEED else 100.0
        return await slow(request, on_progress)

    engine.generate = generate  # type: ignore[method-assign]
    asset, seconds = best(engine, of(3, budget=10.0))
    assert (asset.ply, seconds, engine.cancelled) == (b"splat 0", 10.0, 2)


def test_a_budget_too_short_for_one_is_no_reason_to_return_nothing() -> None:
    engine = Engine(scores={0: 0.7})
    asset, seconds = best(engine, of(8, budget=0.5))
    assert (asset.ply, seconds) == (b"splat 0", engine.seconds)


@pytest.mark.parametrize("number", [0, 2])
def test_a_candidate_that_fails_takes_no_other_along(number: int) -> None:
    scores: dict[int, Any] = {0: 0.7, 1: 0.8, 2: 0.9, number: StageFailed("out of memory")}
    asset, _ = best(Engine(scores=scores), of(4))
    assert asset.ply == (b"splat 2" if number == 0 else b"splat 1")
    assert asset.report.candidates[0] == (SEED, None if number == 0 else 0.7)


def test_where_all_fail_the_failure_is_told_and_not_many_are_tried() -> None:
    engine = Engine(places=1, scores=dict.fromkeys(range(64), StageFailed("broken")))
    with pytest.raises(StageFailed, match="broken"):
        best(engine, of(64))
    assert len(engine.begun) == 2


def test_a_refusal_is_told_and_a_later_one_loses_nothing() -> None:
    with pytest.raises(Unavailable):
        best(Engine(places=1, scores={0: Unavailable("queue full", 3)}), of(8))
    engine = Engine(places=1, scores={0: 0.7, 1: Unavailable("shutting down", None)})
    asset, _ = best(engine, of(8))
    assert (asset.ply, len(engine.begun)) == (b"splat 0", 2)


@pytest.mark.parametrize(("hopeless", "begun"), [(True, 1), (False, 8)])
def test_other_seeds_follow_unless_none_can_help(hopeless: bool, begun: int) -> None:
    engine = Engine(places=1)

    async def generate(request: Request, on_progress: Any = None) -> Asset:
        engine.begun.append(request)
        return Asset(b"", Report(request.seed, rejected="nothing stands out", hopeless=hopeless))

    engine.generate = generate  # type: ignore[method-assign]
    best(engine, of(8, prompt=None, image=Image.new("RGB", (8, 8))))
    assert len(engine.begun) == begun


def test_who_hangs_up_cancels_them_all() -> None:
    async def main() -> None:
        asking = asyncio.create_task(candidates.generate(of(64)))
        await asyncio.sleep(1)
        assert engine.running == 3
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert (engine.running, engine.cancelled) == (0, 3)
        await asyncio.sleep(10)
        assert len(engine.begun) == 3

    engine = Engine()
    candidates = Candidates(engine)
    run(main)


def test_none_is_begun_while_somebody_waits() -> None:
    async def main() -> None:
        asking = asyncio.create_task(candidates.generate(of(2)))
        await asyncio.sleep(5)
        assert len(engine.begun) == 1
        engine.waiting = 0
        await asyncio.sleep(2 * LOOK_S)
        assert len(engine.begun) == 2
        await asking

    engine = Engine()
    engine.waiting = 1
    candidates = Candidates(engine)
    run(main)


def test_requests_share_the_places() -> None:
    async def main() -> None:
        first = asyncio.create_task(candidates.generate(of(64, budget=8.0)))
        await asyncio.sleep(2.5)
        second = asyncio.create_task(candidates.generate(of(64, budget=8.0)))
        counts = [len((await each).report.candidates) for each in (first, second)]
        assert min(counts) >= 4, counts

    engine = Engine(places=3)
    candidates = Candidates(engine)
    run(main)


def test_a_persons_candidates_go_first() -> None:
    async def main() -> None:
        background = asyncio.create_task(candidates.generate(of(8)))
        await asyncio.sleep(0.5)
        person = asyncio.create_task(candidates.generate(of(4, background=False)))
        await person
        assert [each.background for each in engine.begun[:6]].count(False) == 4
        await background

    engine = Engine(places=2)
    candidates = Candidates(engine)
    run(main)


def test_progress_goes_up_and_names_the_candidates() -> None:
    told: list[tuple[str, float]] = []
    best(Engine(places=1), of(4), lambda stage, fraction: told.append((stage, fraction)))
    assert told[0] == ("dreamgaussian", 1.0)
    assert {stage for stage, _ in told[1:]} == {STAGE}
    assert told[-1] == (STAGE, 1.0)
    assert [fraction for _, fraction in told[1:]] == sorted(fraction for _, fraction in told[1:])
