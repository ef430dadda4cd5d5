"""The pool of generation services: where a task goes, and what becomes of an endpoint that fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from neurons.miner.assignment import USEFUL_AGE_S
from neurons.miner.generation.pool import FIRST_PAUSE_S, HEALTH_INTERVAL_S, GeneratorPool, Pace, ServiceUnavailable
from neurons.miner.generation.service import AttemptFailed, EndpointUnavailable, GenerationFailed
from scripts.bench import virtual_time
from scripts.bench.virtual_time import now
from tests.support.timed_services import TASK, Service, with_pool

HOUR_S = 3600.0


def test_a_task_leaves_an_endpoint_that_vanished_with_it() -> None:
    """Its connection stays open for ever: only its health tells."""

    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds = 1e6
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        assert len(first.asked) == 1
        first.status = EndpointUnavailable("not reachable")
        began = now()
        assert (await generating).endpoint == second.endpoint
        assert now() - began <= 2 * HEALTH_INTERVAL_S + second.seconds + 1

    with_pool(test)


def test_a_health_check_that_fails_once_takes_no_task_away() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds = 4 * HEALTH_INTERVAL_S
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        first.status = EndpointUnavailable("not reachable")
        await asyncio.sleep(HEALTH_INTERVAL_S + 0.1)
        first.status = "ready"
        assert (await generating).endpoint == first.endpoint
        assert not second.asked

    with_pool(test)


def test_a_service_that_is_busy_has_not_failed() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        second.status = "loading"
        await asyncio.sleep(HEALTH_INTERVAL_S + 0.1)
        first.outcomes.extend(EndpointUnavailable("busy", 1.0) for _ in range(6))
        await pool.generate(TASK, 1)
        first.outcomes.extend([EndpointUnavailable("busy", 1.0)] * 6)
        first.outcomes.append(EndpointUnavailable("gone"))
        began = now()
        await pool.generate(TASK, 1)
        assert now() - began < 6 * 1.1 + FIRST_PAUSE_S + first.seconds + 1

    with_pool(test)


def test_least_outstanding_work_first() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        await asyncio.gather(*(pool.generate(TASK, 1) for _ in range(4)))
        assert len(first.asked) == len(second.asked) == 2

    with_pool(test)


def test_a_faster_endpoint_gets_more() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        second.seconds = 30.0

        async def work() -> None:
            for _ in range(20):
                await pool.generate(TASK, 1)

        await asyncio.gather(*(work() for _ in range(4)))
        assert 50 <= len(first.asked) <= 68  # of 80; by their speed 60

    with_pool(test)


def test_one_task_at_a_time_measures_every_endpoint() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        for _ in range(2):
            await pool.generate(TASK, 1)
        assert len(first.asked) == len(second.asked) == 1
        assert pool.candidates_within(100.0, 1) > 1

    with_pool(test)


def test_an_endpoint_that_was_slow_once_gets_tasks_again() -> None:
    """A person's request, or the first one after a start: the other endpoint would be asked for ever."""

    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        usual, first.seconds = first.seconds, 100.0
        await asyncio.gather(*(pool.generate(TASK, 1) for _ in range(2)))
        first.seconds = usual
        assert pool.candidates_within(2.5 * usual, 1) == 0
        asked = len(first.asked)
        for _ in range(100):
            await asyncio.sleep(30.0)
            await pool.generate(TASK, 1)
        assert len(first.asked) > asked
        assert pool.candidates_within(2.5 * usual, 1) == 2
        busy = [len(each.asked) for each in (first, second)]
        await asyncio.gather(*(pool.generate(TASK, 1) for _ in range(4)))
        assert [len(each.asked) - before for each, before in zip((first, second), busy, strict=True)] == [2, 2]

    with_pool(test)


def test_an_endpoint_that_is_slow_is_tried_seldom() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds = 100.0
        for _ in range(400):
            await asyncio.sleep(30.0)
            await pool.generate(TASK, 1)
        assert 3 <= len(first.asked) <= 8  # each 2,000 s

    with_pool(test)


def test_how_many_candidates_fit_is_known_from_what_they_took() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        assert pool.seconds_without_wait() is None
        assert pool.candidates_within(1000.0, 1) == 0
        first.seconds, second.seconds = 2.0, 4.0
        await asyncio.gather(*(pool.generate(TASK, 1) for _ in range(2)))
        assert pool.seconds_without_wait() == 4.0
        assert pool.candidates_within(3.9, 1) == 0  # it may come to the second one
        assert pool.candidates_within(8.0, 1) == pool.candidates_within(8.0, 2) == 2
        assert pool.candidates_within(8.0, 4) == 1  # two on each

    with_pool(test)


def test_candidates_of_one_request_count_each() -> None:
    pace = Pace(now)

    async def main() -> None:
        begun = pace.begin()
        await asyncio.sleep(2.0)
        pace.end(begun, 1)
        begun = pace.begin()
        await asyncio.sleep(8.0)
        pace.end(begun, 8)
        assert pace.duration == 2.0
        assert pace.cost == pytest.approx((0.9 * 2 + 8) / (0.9 + 8))

    virtual_time.run(main())


def test_a_service_that_gets_slower_is_noticed_by_its_candidates_too() -> None:
    pace = Pace(now)

    async def main() -> None:
        for seconds, candidates in [(1.0, 1), *[(24.0, 4)] * 50]:
            begun = pace.begin()
            await asyncio.sleep(seconds)
            pace.end(begun, candidates)
        assert pace.duration == pytest.approx(6.0, rel=0.01)

    virtual_time.run(main())


def test_what_is_rejected_before_it_is_made_tells_no_duration() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        await asyncio.gather(*(pool.generate(TASK, seed) for seed in range(2)))
        before = pool.seconds_without_wait()
        first.seconds = second.seconds = 0.1
        first.is_rejecting = second.is_rejecting = True
        rejected = await asyncio.gather(*(pool.generate(TASK, seed) for seed in range(2)))
        assert not any(each.ply for each in rejected)
        assert pool.seconds_without_wait() == before

    with_pool(test)


def test_what_is_rejected_for_its_score_took_as_long_as_another() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.is_rejecting = second.is_rejecting = True
        first.score = second.score = 0.4
        await asyncio.gather(*(pool.generate(TASK, seed) for seed in range(2)))
        assert pool.seconds_without_wait() == first.seconds

    with_pool(test)


def test_a_task_of_an_endpoint_that_is_gone_moves_on_at_once() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.outcomes.extend([EndpointUnavailable("gone")] * 3)
        started = now()
        generated = await asyncio.gather(*(pool.generate(TASK, 1) for _ in range(2)))
        assert {each.endpoint for each in generated} == {"http://second"}
        assert now() - started == 20
        # Left out for a time that doubles, then taken again.
        await asyncio.sleep(200)
        await asyncio.gather(*(pool.generate(TASK, 1) for _ in range(2)))
        assert first.outcomes  # a failure less

    with_pool(test)


def test_pauses_double_while_it_fails() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        second.status = EndpointUnavailable("gone")
        await asyncio.sleep(10)
        first.outcomes.extend([EndpointUnavailable("gone")] * 4)
        await pool.generate(TASK, 1)
        waits = [later - earlier for earlier, later in itertools.pairwise(first.asked)]
        assert waits == pytest.approx([FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S], abs=0.1)
        assert pool.usable == {"http://first": True, "http://second": False}

    with_pool(test)


def test_an_endpoint_that_was_started_again_is_left_out_no_longer() -> None:
    """It failed at everything until then, so that its pauses are minutes long."""

    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        second.status = "loading"
        first.outcomes.extend([AttemptFailed("500")] * 9)
        for _ in range(9):
            with contextlib.suppress(AttemptFailed):
                await pool.generate(TASK, 1, HOUR_S)
        assert not pool.ready.is_set()
        first.status = "loading"
        await asyncio.sleep(HEALTH_INTERVAL_S + 1)
        first.status = "ready"
        began = now()
        await pool.generate(TASK, 1)
        assert now() - began <= HEALTH_INTERVAL_S + first.seconds

    with_pool(test)


def test_tasks_that_fail_together_are_one_failure() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        second.status = EndpointUnavailable("gone")
        await asyncio.sleep(HEALTH_INTERVAL_S)
        first.fails_after = 3.0
        tasks = [asyncio.create_task(pool.generate(TASK, 1)) for _ in range(8)]
        await asyncio.sleep(2.9)
        assert len(first.asked) == 8
        failing_from = now()
        await asyncio.sleep(0.2)
        first.fails_after = None
        await asyncio.gather(*tasks)
        assert first.asked[8] - failing_from < FIRST_PAUSE_S + 0.2

    with_pool(test)


def test_a_busy_endpoint_is_asked_again_when_it_says() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        for service in (first, second):
            service.outcomes.append(EndpointUnavailable("busy", 7.0))
        started = now()
        await pool.generate(TASK, 1)
        assert now() - started == pytest.approx(17.0, abs=0.1)

    with_pool(test)


def test_a_failed_attempt_moves_on_and_the_endpoint_stays() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.outcomes.append(AttemptFailed("500"))
        assert (await pool.generate(TASK, 1)).endpoint == "http://second"
        assert pool.usable["http://first"]

    with_pool(test)


def test_a_task_that_every_endpoint_fails_at_is_given_back() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.outcomes.append(AttemptFailed("500"))
        second.outcomes.append(AttemptFailed("500"))
        with pytest.raises(AttemptFailed):
            await pool.generate(TASK, 1)
        assert len(first.asked) == len(second.asked) == 1

    with_pool(test)


def test_an_endpoint_that_fails_at_everything_is_left_out() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.outcomes.extend([AttemptFailed("500")] * 3)
        second.seconds = 1000.0  # so that the other one comes first
        second.outcomes.extend([1.0] * 3)
        for _ in range(3):
            await pool.generate(TASK, 1)
        assert not pool.usable["http://first"]

    with_pool(test)


def test_failures_between_which_it_works_leave_no_endpoint_out() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        second.status = "loading"
        await asyncio.sleep(HEALTH_INTERVAL_S)
        for _ in range(5):
            first.outcomes.append(AttemptFailed("500"))
            with pytest.raises(AttemptFailed):
                await pool.generate(TASK, 1)
            assert pool.usable["http://first"]
            await pool.generate(TASK, 1)

    with_pool(test)


def test_an_attempt_is_over_when_one_endpoint_failed_and_the_other_went() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.outcomes.append(AttemptFailed("500"))
        second.outcomes.append(EndpointUnavailable("gone"))
        with pytest.raises(AttemptFailed, match="500"):
            await pool.generate(TASK, 1)
        assert len(first.asked) == len(second.asked) == 1
        assert pool.ready.is_set()  # the first can take the next attempt

    with_pool(test)


def test_a_task_at_fault_is_no_endpoint_s_fault() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.outcomes.append(GenerationFailed("422"))
        with pytest.raises(GenerationFailed):
            await pool.generate(TASK, 1)
        assert pool.usable["http://first"]
        assert not second.asked

    with_pool(test)


def test_no_endpoint_is_waited_for_up_to_a_limit() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.status = second.status = EndpointUnavailable("gone")
        await asyncio.sleep(10)
        assert not pool.ready.is_set()
        started = now()
        with pytest.raises(ServiceUnavailable):
            await pool.generate(TASK, 1)
        assert now() - started == 300
        with pytest.raises(ServiceUnavailable):
            await pool.generate(TASK, 1, patience=70)
        assert now() - started == USEFUL_AGE_S + 70
        waiting = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(1)
        pool.stop_waiting()
        with pytest.raises(ServiceUnavailable):
            await waiting

    with_pool(test)


@pytest.mark.parametrize("patience", [USEFUL_AGE_S, 100.0])
def test_a_generation_that_hangs_is_given_up_in_time(patience: float) -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds = second.seconds = 1e6
        started = now()
        with pytest.raises(AttemptFailed, match="no answer in"):
            await pool.generate(TASK, 1, patience)
        assert now() - started == pytest.approx(patience)
        assert len(first.asked) + len(second.asked) == 1  # there is no time left for the other one

    with_pool(test)


def test_moving_on_and_on_ends_in_time() -> None:
    """Services that say that they are ready and are busy whenever they are asked."""

    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        for service in (first, second):
            service.outcomes.extend([EndpointUnavailable("busy", 7.0)] * 1000)
        started = now()
        with pytest.raises(ServiceUnavailable):
            await pool.generate(TASK, 1)
        assert now() - started == pytest.approx(300, abs=0.1)

    with_pool(test)


@pytest.mark.parametrize("patience", [0.0, -50.0])
def test_a_task_that_waited_too_long_already_is_no_endpoint_s_fault(patience: float) -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        with pytest.raises(ServiceUnavailable):
            await pool.generate(TASK, 1, patience)
        assert not first.asked
        assert not second.asked
        assert all(pool.usable.values())

    with_pool(test)


def test_a_late_health_answer_is_one_while_it_works() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.status = None
        await asyncio.sleep(10)
        assert pool.usable["http://first"]
        first.status = "loading"
        await asyncio.sleep(10)
        first.status = None
        await asyncio.sleep(10)
        assert not pool.usable["http://first"]

    with_pool(test)


@pytest.mark.parametrize(
    ("at_once", "tasks", "least", "most"),
    [(1, 1, 10, 40), (1, 8, 76, 84), (4, 1, 9.9, 10.1), (4, 8, 16.5, 23)],
)
def test_the_forecast_knows_one_at_a_time_from_many_at_once(
    at_once: int, tasks: int, least: float, most: float
) -> None:
    async def main() -> None:
        service = Service("http://one", seconds=10.0, at_once=at_once)
        pool = GeneratorPool([service], now)
        watching = asyncio.create_task(pool.watch())
        await pool.ready.wait()
        assert pool.expected_seconds(tasks) is None

        async def work() -> None:
            for _ in range(20):
                await pool.generate(TASK, 1)

        workers = [asyncio.create_task(work()) for _ in range(4)]
        await asyncio.sleep(195)  # no moment at which one ends
        assert least <= (pool.expected_seconds(tasks) or 0) <= most
        for task in (watching, *workers):
            task.cancel()
        await asyncio.gather(watching, *workers, return_exceptions=True)

    virtual_time.run(main())
