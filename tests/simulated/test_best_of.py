"""How many candidates a task gets, and that they cost nothing: the assembled miner in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from neurons.miner.generation.service import AttemptFailed, EndpointUnavailable, Generated
from neurons.miner.records.events import Generation, Submission
from neurons.protocol import Task
from neurons.rehearsal.rules import Limits
from scripts.bench import virtual_time
from scripts.bench.simulated_subnet import (
    SPLAT,
    Behaviour,
    MemoryBooks,
    SimulatedNetwork,
    StandInService,
    options_in,
    simulated_miner,
)
from scripts.bench.virtual_time import now

HOUR_S = 3600.0
TWO_TASKS_S = 400.0
THROTTLE_S = Limits().throttle_period


class Service(StandInService):
    """`scores` are what the next requests get, each with its own splat; an error is raised after `fails_after` s."""

    def __init__(self, seconds: float, at_once: int = 1, scores: Sequence[float | Exception] = ()) -> None:
        super().__init__(seconds, at_once)
        self.scores = list(scores)
        self.asked: list[tuple[float, int, float | None]] = []  # time, candidates, budget

    async def generate(self, task: Task, seed: int, candidates: int = 1, budget: float | None = None) -> Generated:
        self.asked.append((now(), candidates, budget))
        generated = await super().generate(task, seed, candidates, budget)
        if not self.scores:
            return generated
        score = self.scores.pop(0)
        if isinstance(score, Exception):
            raise score
        fit = score >= 0.6
        return replace(generated, ply=SPLAT if fit else b"", score=score, rejected="" if fit else "too low", scores=())


@dataclass
class Run:
    network: SimulatedNetwork
    events: list[Any]

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def accepted(self) -> int:
        return sum(each.accepted for each in self.network.validators)

    @property
    def held(self) -> list[float]:
        return [seconds for each in self.network.validators for _, seconds in each.held]


def mine(
    folder: Path,
    service: Service,
    behaviours: Sequence[Behaviour] = (Behaviour(),) * 3,
    seconds: float = HOUR_S,
    beside: Sequence[Service] = (),
    limits: Limits = Limits(),  # noqa: B008
    **options: Any,
) -> Run:
    async def main() -> Run:
        network, books = SimulatedNetwork(behaviours, limits), MemoryBooks()
        miner = await simulated_miner(replace(options_in(folder), **options), network, [service, *beside], books)
        parts = [asyncio.create_task(part) for part in (miner.pool.watch(), *(each.run() for each in miner.workers))]
        await asyncio.sleep(seconds)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, *parts, return_exceptions=True)
        return Run(network, books.events)

    return virtual_time.run(main())


def test_candidates_take_no_task_and_no_penalty(tmp_path: Path) -> None:
    one = mine(tmp_path / "1", Service(1.0), best_of=1)
    auto = mine(tmp_path / "2", Service(1.0))
    assert auto.accepted >= one.accepted
    assert sum(each.violations for each in auto.network.validators) == 0
    assert max(auto.held) <= THROTTLE_S
    counts = [event.candidates for event in auto.of(Generation)]
    assert sum(counts) / len(counts) > 5  # three tasks at once, of 26 s in all


def test_best_of_one_asks_for_one(tmp_path: Path) -> None:
    service = Service(1.0)
    run = mine(tmp_path, service, best_of=1)
    assert {(candidates, budget) for _, candidates, budget in service.asked} == {(1, None)}
    assert len(service.asked) == len(run.of(Generation))
    assert max(run.held) < 6  # three tasks came together


@pytest.mark.parametrize("most", [2, 5])
def test_a_limit_is_kept(tmp_path: Path, most: int) -> None:
    run = mine(tmp_path, Service(1.0), [Behaviour()], best_of=most)
    assert [event.candidates for event in run.of(Generation)[1:]] == [most] * (len(run.of(Generation)) - 1)


def test_a_slow_generator_gets_one_candidate(tmp_path: Path) -> None:
    run = mine(tmp_path, Service(20.0), [Behaviour()])
    assert {event.candidates for event in run.of(Generation)} == {1}


def test_a_slower_service_beside_it_takes_no_candidates_away(tmp_path: Path) -> None:
    """A round lasts as long as one candidate takes at whichever of them the task comes to."""
    run = mine(tmp_path, Service(2.0), beside=[Service(6.0)])
    counts = [event.candidates for event in run.of(Generation)]
    assert sum(counts) / len(counts) > 5
    assert max(run.held) <= THROTTLE_S
    assert run.accepted == 36


def test_what_a_validator_takes_for_a_submission_is_left_for_it(tmp_path: Path) -> None:
    slow = Behaviour(validation=15.0)
    one = mine(tmp_path / "1", Service(1.0), [slow], seconds=2 * HOUR_S, best_of=1)
    auto = mine(tmp_path / "2", Service(1.0), [slow], seconds=2 * HOUR_S)
    assert auto.accepted >= one.accepted
    assert all(held + slow.validation <= THROTTLE_S for held in auto.held)
    assert max(event.candidates for event in auto.of(Generation)) > 5


def test_the_time_that_is_free_begins_when_the_task_is_given(tmp_path: Path) -> None:
    """Not when its pull's answer comes."""
    run = mine(tmp_path, Service(1.0), [Behaviour(pull_delay=8.0)])
    assert max(event.candidates for event in run.of(Generation)) > 5
    assert max(run.held) <= THROTTLE_S


def test_a_task_that_is_given_again_has_no_free_time_any_more(tmp_path: Path) -> None:
    """Its service was gone for longer than a task is worth waiting for."""
    service = Service(1.0)
    made = service.generate

    async def generate(task: Task, seed: int, candidates: int = 1, budget: float | None = None) -> Generated:
        if service.asked and now() < service.asked[0][0] + 700.0:
            raise EndpointUnavailable("gone")
        return await made(task, seed, candidates, budget)

    service.generate = generate  # type: ignore[method-assign]
    run = mine(tmp_path, service, [Behaviour()], seconds=1000.0)
    assert [event.candidates for event in run.of(Generation) if event.outcome == "generated"] == [1, 1]
    assert run.accepted == 2


def test_no_throttle_period_makes_the_miner_hold_a_task_for_long(tmp_path: Path) -> None:
    run = mine(tmp_path, Service(1.0), [Behaviour()], limits=replace(Limits(), throttle_period=1000.0))
    assert max(run.held) <= 2 * THROTTLE_S


def test_the_best_of_all_rounds_goes_out_once(tmp_path: Path) -> None:
    service = Service(1.0, scores=[0.61, 0.7, 0.8, 0.65, 0.9, 0.61, *[0.5] * 40])
    run = mine(tmp_path, service, [Behaviour()], seconds=TWO_TASKS_S)
    first, event = run.of(Generation)
    assert first.candidates == 1  # what its validator takes for a submission is not known yet
    assert (event.outcome, event.score, event.first_score) == ("generated", 0.9, 0.7)
    assert event.candidates == len(service.asked) - 1  # one a round, by this service's answers
    assert [each.outcome for each in run.of(Submission)] == ["accepted"] * 2


def test_a_round_that_fails_loses_nothing(tmp_path: Path) -> None:
    run = mine(tmp_path, Service(1.0, scores=[0.7, 0.7, AttemptFailed("500")]), [Behaviour()], seconds=TWO_TASKS_S)
    assert [event.outcome for event in run.of(Generation)] == ["generated", "failed", "generated"]
    assert [event.outcome for event in run.of(Submission)] == ["accepted"] * 2


def test_a_round_that_hangs_is_given_up_in_time(tmp_path: Path) -> None:
    service = Service(1.0)
    made = service.generate

    async def generate(task: Task, seed: int, candidates: int = 1, budget: float | None = None) -> Generated:
        if len(service.asked) == 2:
            service.asked.append((now(), candidates, budget))
            await asyncio.sleep(1000)
        return await made(task, seed, candidates, budget)

    service.generate = generate  # type: ignore[method-assign]
    run = mine(tmp_path, service, [Behaviour()], seconds=TWO_TASKS_S)
    assert len(service.asked) == 3
    assert [event.outcome for event in run.of(Submission)] == ["accepted"] * 2
    assert max(run.held) <= THROTTLE_S


def test_below_the_threshold_it_goes_on_while_that_is_free_and_then_counts(tmp_path: Path) -> None:
    service = Service(1.0, scores=[0.7] + [0.5] * 1000)
    run = mine(tmp_path, service, [Behaviour()], seconds=TWO_TASKS_S, retries=2)
    second = [at for at, _, _ in service.asked[1:]]
    free = [at for at in second if at - second[0] < THROTTLE_S - 5]
    assert len(free) >= 5
    assert 1 <= len(second) - len(free) <= 3
    assert [event.outcome for event in run.of(Submission)] == ["accepted", "empty"]
    scores = [0.7] + [0.5] * 4 + [0.7] * 1000
    fit = mine(tmp_path / "2", Service(1.0, scores=scores), [Behaviour()], seconds=TWO_TASKS_S, retries=0)
    assert [event.outcome for event in fit.of(Submission)] == ["accepted"] * 2


def test_tasks_that_come_together_share_the_time(tmp_path: Path) -> None:
    """Twelve at once, and four workers: none is held longer than what is free."""
    run = mine(tmp_path, Service(0.5), (Behaviour(),) * 12, seconds=1500.0)
    assert max(run.held) <= THROTTLE_S
    later = [event.candidates for event in run.of(Generation)[12:]]
    assert sum(count > 1 for count in later) > 0.5 * len(later)


def last_results_within(run: Run) -> float:
    """Seconds from the first to the last of the validators' latest results."""
    latest = [each.held[-1][0] for each in run.network.validators]
    return max(latest) - min(latest)


@pytest.mark.slow
def test_validators_in_step_are_asked_apart_and_stay_so(tmp_path: Path) -> None:
    """Twelve tasks at once leave no time for a second candidate of 2.8 s. Apart, each has 25 s."""
    twelve, seconds = (Behaviour(),) * 12, 1.5 * HOUR_S
    one = mine(tmp_path / "1", Service(2.8), twelve, seconds, best_of=1)
    auto = mine(tmp_path / "2", Service(2.8), twelve, seconds)
    assert last_results_within(one) < 60
    assert last_results_within(auto) > 200
    assert auto.accepted >= 0.97 * one.accepted
    assert sum(each.violations for each in auto.network.validators) == 0
    assert max(seconds for each in auto.network.validators for _, seconds in each.held[2:]) <= THROTTLE_S
    later = [event.candidates for event in auto.of(Generation)[36:]]
    assert sum(later) / len(later) > 6
    # Moved once, each of them has all the tasks that its cooldowns allow.
    last_hour = [[at for at, _ in each.held if at > each.held[-1][0] - HOUR_S + 5] for each in auto.network.validators]
    assert min(map(len, last_hour)) == 12


def test_nobody_waits_for_candidates_that_are_not_made(tmp_path: Path) -> None:
    slow = mine(tmp_path, Service(20.0, at_once=4), (Behaviour(),) * 3, best_of=1)
    assert last_results_within(slow) < 30
    slower = mine(tmp_path / "2", Service(20.0), (Behaviour(),) * 3)
    one = mine(tmp_path / "3", Service(20.0), (Behaviour(),) * 3, best_of=1)
    assert slower.accepted == one.accepted
    assert slower.held == pytest.approx(one.held, abs=0.5)
