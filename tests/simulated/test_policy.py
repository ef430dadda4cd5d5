"""The policy: who is skipped, for how long, and who never is."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurons.miner.records.bookkeeping import Bookkeeping
from neurons.miner.records.events import Event
from neurons.miner.records.policy import EXPLORATION_INTERVAL_S, Policy
from neurons.miner.records.standings import WINDOW_S, Standing, read
from neurons.rehearsal.rules import Limits
from scripts.bench import virtual_time
from scripts.bench.simulated_subnet import (
    MINER,
    Behaviour,
    SimulatedNetwork,
    StandInService,
    options_in,
    simulated_miner,
)
from scripts.bench.virtual_time import now
from tests.support.ledger_events import NOW

TASK_S = 20.0
GOOD = Standing(1, "good", attempted=40, submitted=40, accepted=38, gpu_s=40 * TASK_S, last_task_at=NOW)


def standing(accepted: int, submitted: int, gpu_s: float | None = None) -> Standing:
    seconds = submitted * TASK_S if gpu_s is None else gpu_s
    tasks = {"attempted": submitted, "submitted": submitted}
    return Standing(2, "judged", **tasks, accepted=accepted, gpu_s=seconds, last_task_at=NOW)


def policy(least_reward: float, judged: Standing | None) -> Policy:
    result = Policy(least_reward)
    result.update({"good": GOOD} if judged is None else {"good": GOOD, "judged": judged})
    return result


@st.composite
def standings(draw: st.DrawFn) -> Standing:
    submitted = draw(st.integers(0, 100))
    accepted = draw(st.integers(0, submitted))
    return standing(accepted, submitted, draw(st.floats(0, 900)) * submitted)


def test_one_that_accepts_nothing_is_skipped_until_it_may_show_itself() -> None:
    # 3 of 24 expected at 20 s each: 0.00625 accepted results per GPU second.
    judged = policy(0.01, standing(0, 20))
    assert judged.ask_at("judged") == NOW + EXPLORATION_INTERVAL_S
    assert judged.ask_at("good") == 0.0
    assert policy(0.006, standing(0, 20)).ask_at("judged") == 0.0


def test_expected_reward_is_accepted_results_per_gpu_second() -> None:
    # (3 + 16) of (4 + 20), at a little more than 20 s each.
    assert policy(0.0, standing(16, 20)).expected_reward("judged") == 19 / 24 / TASK_S
    assert policy(0.0, None).expected_reward("judged") == 3 / 4 / TASK_S


def test_slow_prompts_count_as_much_as_declined_results() -> None:
    """Half of the results accepted, or all of them at twice the seconds: the same within what the prior allows."""
    half, slow = standing(500, 1000), standing(1000, 1000, gpu_s=1000 * 2 * TASK_S)
    one, other = policy(0.0, half), policy(0.0, slow)
    # Typical seconds are not the same in both, which is why this is no equality.
    expected, as_much = one.expected_reward("judged"), other.expected_reward("judged")
    assert expected is not None
    assert as_much is not None
    assert abs(expected - as_much) < 0.01 * expected


def test_candidates_made_in_free_time_make_nobody_dear() -> None:
    many = replace(standing(16, 20, gpu_s=20 * 9 * TASK_S), candidates=9.0)
    judged = Policy(0.0)
    judged.update({"good": replace(GOOD, gpu_s=40 * 9 * TASK_S, candidates=9.0), "judged": many})
    assert judged.expected_reward("judged") == pytest.approx(19 / 24 / TASK_S)


def test_a_task_on_its_way_to_its_validator_makes_nobody_dear() -> None:
    """At the start of a miner there is little else: an hour of all validators was lost by one look at that moment."""
    first = replace(GOOD, attempted=1, submitted=1, accepted=1, gpu_s=TASK_S)
    on_its_way = replace(standing(0, 0), attempted=1, gpu_s=TASK_S)
    start = Policy(0.036)  # 3 of 4 at 20 s are 0.0375
    start.update({"good": first, "judged": on_its_way})
    assert start.ask_at("judged") == start.ask_at("good") == 0.0


def test_one_that_repeats_its_ids_makes_nobody_dear() -> None:
    """What is one task by its id was submitted 40 times."""
    repeats = replace(standing(0, 40), attempted=1)
    judged = Policy(0.036)
    judged.update({"good": replace(GOOD, attempted=1, submitted=1, accepted=1, gpu_s=TASK_S), "judged": repeats})
    assert judged.ask_at("good") == 0.0


def test_nothing_known_skips_nobody() -> None:
    fresh = Policy(1.0)
    assert fresh.ask_at("judged") == 0.0
    assert fresh.expected_reward("judged") is None
    assert policy(1.0, None).ask_at("judged") == 0.0
    # A task that never got a result says nothing about cost.
    alone = Policy(1.0)
    alone.update({"judged": replace(standing(0, 0), last_task_at=NOW)})
    assert alone.ask_at("judged") == 0.0


@given(standings())
def test_without_a_limit_nobody_is_skipped(judged: Standing) -> None:
    assert policy(0.0, judged).ask_at("judged") == 0.0


@given(standings(), st.floats(0, 10))
def test_nobody_is_skipped_for_longer_than_the_exploration_interval(judged: Standing, limit: float) -> None:
    assert policy(limit, judged).ask_at("judged") in (0.0, NOW + EXPLORATION_INTERVAL_S)


@given(st.integers(0, 2), st.floats(0.001, 1))
def test_two_bad_results_do_not_condemn(bad: int, share: float) -> None:
    """A newcomer that begins with two bad results at the usual cost passes two thirds of what newcomers pass."""
    fresh = policy(0.0, None).expected_reward("judged")
    assert fresh is not None
    assert policy(0.999 * fresh * 2 / 3 * share, standing(0, bad)).ask_at("judged") == 0.0


@given(standings())
def test_one_more_accepted_is_never_worse_than_one_more_declined(judged: Standing) -> None:
    more = replace(judged, attempted=judged.attempted + 1, submitted=judged.submitted + 1, gpu_s=judged.gpu_s + TASK_S)
    better = policy(0.0, replace(more, accepted=more.accepted + 1)).expected_reward("judged")
    worse = policy(0.0, more).expected_reward("judged")
    assert better is not None
    assert worse is not None
    assert better > worse


@given(standings(), st.floats(0.1, 1000))
def test_more_gpu_seconds_never_earn_more(judged: Standing, more: float) -> None:
    before = policy(0.0, judged).expected_reward("judged")
    after = policy(0.0, replace(judged, gpu_s=judged.gpu_s + more)).expected_reward("judged")
    assert before is not None
    assert after is not None
    assert after < before


# --- in the miner, where generators are short: 12 validators ask for 144 tasks an hour, and 60 can be made


class PatientBooks(Bookkeeping):
    def record(self, event: Event) -> None:
        super().record(event)
        while self.backlog:  # time is virtual, and the ledger's thread is not: it would fall behind by hours
            time.sleep(0.0002)


def _mine_for_4_hours(folder: Path, least_reward: float) -> tuple[list[int], list[int]]:
    """Tasks given and results accepted by each validator; the last 4 of the 12 accept nothing."""

    async def main() -> tuple[list[int], list[int]]:
        network = SimulatedNetwork([Behaviour()] * 8 + [Behaviour(score=0.1)] * 4, Limits())
        options = replace(options_in(folder), min_reward=least_reward, retries=0)
        books = PatientBooks(options.ledger_of(MINER.ss58_address), 0, least_reward, now)
        books.start()
        miner = await simulated_miner(options, network, [StandInService(60.0, 1)], books)
        workers = (worker.run() for worker in miner.workers)
        parts = asyncio.gather(miner.pool.watch(), books.follow_standings(), *workers)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(parts, WINDOW_S)
        await miner.manager.close()
        await books.close()
        found = read(options.ledger_of(MINER.ss58_address), now())
        return (
            [found[each.hotkey].tasks for each in network.validators],
            [each.accepted for each in network.validators],
        )

    return virtual_time.run(main())


@pytest.mark.slow
def test_where_generators_are_short_the_policy_earns_more(tmp_path: Path) -> None:
    tasks, accepted = _mine_for_4_hours(tmp_path / "all", 0.0)
    fewer, more = _mine_for_4_hours(tmp_path / "those that pay", 0.008)
    assert sum(accepted[8:]) == sum(more[8:]) == 0
    assert sum(more) >= 1.1 * sum(accepted)
    # What taught it, and one an hour since: none is forgotten.
    assert all(4 <= count <= 8 for count in fewer[8:])
    assert all(count >= 12 for count in tasks[8:])
    assert min(fewer[:8]) >= min(tasks[:8])
