"""The miner's real parts on a simulated subnet in virtual time: no violation, nothing late, nothing lost."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from neurons.miner.assignment import USEFUL_AGE_S
from neurons.miner.records.events import Event, Generation, Pull, Settlement, Submission
from neurons.miner.validators.clock import UNKNOWN_CLOCK_MARGIN_S
from scripts.bench.miner import AIM, ALL_GOOD, BASE, MIXED, PROMISE, Case, ceiling, simulate
from scripts.bench.simulated_subnet import (
    Behaviour,
    StandInService,
)
from scripts.bench.virtual_time import now
from tests.support.mining import HOUR, Miner, Network, in_virtual_time, limits, mining, violations

# --- every allowed task, and no violation


@pytest.mark.parametrize(
    "case",
    [
        Case(60, 20, BASE, PROMISE, ALL_GOOD),
        Case(60, 20, BASE, AIM, MIXED),
        Case(300, 30, BASE, AIM, ALL_GOOD),
        Case(300, 30, BASE, PROMISE, MIXED),
        Case(60, 20, BASE, BASE, ALL_GOOD),
    ],
    ids=str,
)
@pytest.mark.slow
def test_at_least_95_percent_of_the_ceiling_and_no_violation(case: Case) -> None:
    outcome = simulate(case, HOUR, ours=True)
    assert outcome.total >= 0.95 * ceiling(case, HOUR) - 1
    assert outcome.total <= ceiling(case, HOUR)
    assert outcome.violations == 0


def test_dead_and_slow_validators_cost_the_good_ones_next_to_nothing() -> None:
    """A task or two at the start, where their pulls hold places and nothing is measured yet."""
    case = Case(60, 20, BASE, PROMISE, MIXED)
    mixed = simulate(case, HOUR / 2, ours=True)
    alone = simulate(replace(case, validators=ALL_GOOD), HOUR / 2, ours=True)
    assert sum(mixed.accepted[6:]) >= sum(alone.accepted[6:]) - 2


@pytest.mark.parametrize("offset", [-5.0, -2.5, 0.0, 2.5, 5.0])
def test_no_violation_without_date_headers(tmp_path: Path, offset: float) -> None:
    async def test() -> None:
        network = Network([Behaviour(clock_offset=offset)], limits())
        async with mining(network, tmp_path) as miner:
            network.on_date = lambda *_: None
            await asyncio.sleep(HOUR)
            assert violations(network) == 0
            # At most a margin after each cooldown, and the other way round for a clock that is ahead.
            assert network.validators[0].accepted >= HOUR / (301 + 2 * UNKNOWN_CLOCK_MARGIN_S) - 1
            assert miner.count(Pull, "cooldown") == 0

    in_virtual_time(test)


def test_a_validator_s_clock_that_is_set_costs_one_violation_at_most(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network([Behaviour()], limits())
        async with mining(network, tmp_path):
            await asyncio.sleep(HOUR)
            validator = network.validators[0]
            validator.behaviour = replace(validator.behaviour, clock_offset=-120.0)
            await asyncio.sleep(HOUR)
            assert violations(network) <= 1
            assert validator.accepted >= 22

    in_virtual_time(test)


def test_nothing_is_held_past_its_use_by_a_slow_generator(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network(ALL_GOOD, limits())
        async with mining(network, tmp_path, StandInService(118.0, 1)) as miner:
            held = []
            await asyncio.sleep(600)  # the first ones, begun before anything is measured, are gone
            for _ in range(100):
                held.append(max((now() - assignment.pulled_at for assignment in miner.manager.held), default=0.0))
                await asyncio.sleep(30)
            assert max(held) < USEFUL_AGE_S

    in_virtual_time(test)


def test_a_validator_that_gives_the_same_task_again_gets_the_same_result(tmp_path: Path) -> None:
    """Killed after the generation and before an answer: the result is in the spool, and is not made twice."""

    async def test() -> None:
        network = Network([Behaviour()], limits())
        service = StandInService(20.0, 4)
        async with mining(network, tmp_path, service):
            await asyncio.sleep(10)
            network.down = True
            await asyncio.sleep(30)
        assert service.generated == 1
        network.down = False
        # The spool is not looked through at the start here: what counts is the task's own id.
        async with mining(network, tmp_path, service) as miner:
            await asyncio.sleep(60)
            assert network.validators[0].accepted == 1
            assert service.generated == 1
            assert miner.count(Submission, "accepted") == 1
        assert os.listdir(tmp_path) == []
        assert violations(network) == 0 or miner.count(Pull, "cooldown") == 0

    in_virtual_time(test)


def test_a_network_that_is_gone_for_a_minute_loses_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network(ALL_GOOD[:6], limits(60, 20))
        service = StandInService(5.0, 4)
        async with mining(network, tmp_path, service, best_of=1) as miner:
            for _ in range(10):
                await asyncio.sleep(90)
                network.down = True
                await asyncio.sleep(60)
                network.down = False
            await asyncio.sleep(120)
            generated = {event.task.id for event in miner.events if isinstance(event, Generation)}
            answered = {event.task_id for event in miner.events if isinstance(event, Submission)}
            assert len(generated - answered) <= 6  # what is in hand right now
            assert service.generated == len(generated)  # nothing was made twice
            # An answer that was lost on its way is known by the next one's count.
            assert miner.outcomes() == {"accepted": len(answered)}
            assert sum(validator.accepted for validator in network.validators) == len(answered)
        # One early pull for each lost answer, to learn what the cooldown is.
        assert violations(network) <= miner.count(Submission, "unknown")

    in_virtual_time(test)


@pytest.mark.parametrize("tasks_before", [0, 1])
@pytest.mark.parametrize("deaf", [16, 60])  # within the lock and longer
def test_a_result_whose_answer_was_lost_is_no_way_around_the_cooldown(
    tmp_path: Path, tasks_before: int, deaf: float
) -> None:
    async def test() -> None:
        network = Network([Behaviour()], limits())
        service = StandInService(20.0, 4)
        async with mining(network, tmp_path, service) as miner:
            await asyncio.sleep(10 + 300 * tasks_before)
            # This task's result arrives, and the answer to it does not.
            network.deaf = True
            await asyncio.sleep(deaf)
            network.deaf = False
            await asyncio.sleep(HOUR)
            accepted = network.validators[0].accepted
            assert miner.count(Submission, "unknown") == miner.count(Settlement, "accepted") == 1
            assert miner.outcomes() == {"accepted": accepted}
            assert accepted >= 10
            assert service.generated - accepted in (0, 1)
            assert len(os.listdir(tmp_path)) <= 1  # what is in hand right now
            # The pull that tells of the cooldown, and those whose answers were lost as well.
            assert violations(network) == miner.count(Pull, "cooldown") + miner.count(Pull, "failed") <= 5
            assert miner.count(Pull, "cooldown") == 1

    in_virtual_time(test)


def test_a_network_that_is_gone_for_long_is_waited_for(tmp_path: Path) -> None:
    """A result that was made before has its task all the same: it has no deadline."""

    async def test() -> None:
        network = Network([Behaviour()], limits())
        service = StandInService(20.0, 4)
        async with mining(network, tmp_path, service) as miner:
            await asyncio.sleep(10)
            network.down = True
            await asyncio.sleep(HOUR / 2)
            assert len([call for call in network.calls if call[0] == "SubmitResults"]) < 15  # later and later
            assert miner.count(Submission, "given_up") == 0
            assert len(os.listdir(tmp_path)) == 1
            network.down = False
            await asyncio.sleep(HOUR / 6)
            assert miner.outcomes() == {"accepted": network.validators[0].accepted}
            assert service.generated - network.validators[0].accepted <= 1
        assert violations(network) == 0

    in_virtual_time(test)


# --- parts that break


@pytest.mark.parametrize("kind", [Pull, Generation, Submission])
def test_a_part_that_breaks_starts_again_and_no_task_is_lost(
    tmp_path: Path, kind: type[Event], caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        network = Network([Behaviour()], limits())
        async with mining(network, tmp_path) as miner:
            miner.books.breaks = kind
            await asyncio.sleep(HOUR)
            assert network.validators[0].accepted >= 11
            assert len(miner.manager.held) <= 1
        assert violations(network) == 0
        assert caplog.text.count("RuntimeError: broken on purpose") == 1

    in_virtual_time(test)


def test_a_judgement_that_is_taken_back_costs_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Early ones rest on little; what the next tasks show of the validator counts."""

    async def test() -> None:
        network = Network([Behaviour()] * 2, limits())
        condemned, other = network.validators
        miner = Miner(network, tmp_path, [StandInService(20.0, 4)])
        miner.books.left_alone_until[condemned.hotkey] = now() + HOUR
        await miner.start()
        await asyncio.sleep(600)
        assert len(condemned.held) == 0
        assert len(other.held) == 2
        assert miner.manager.cooldowns[condemned.hotkey] == miner.books.left_alone_until[condemned.hotkey]
        miner.books.left_alone_until[condemned.hotkey] = 0.0
        await asyncio.sleep(100)
        assert len(condemned.held) == 1
        await miner.kill()

    with caplog.at_level(logging.INFO):
        in_virtual_time(test)
    said = [record.getMessage() for record in caplog.records if "earns too little" in record.getMessage()]
    assert said == ["Validator [0] skipped: it earns too little; tried in 3600 s"]
