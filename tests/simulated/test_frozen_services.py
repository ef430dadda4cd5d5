"""Services that accept connections and answer nothing: how soon it is noticed, and what becomes of their tasks."""

from __future__ import annotations

import asyncio

import pytest

from neurons.miner.generation.pool import FROZEN_AFTER, HEALTH_INTERVAL_S, GeneratorPool
from neurons.miner.generation.service import HEALTH_TIMEOUT_S, AttemptFailed, EndpointUnavailable
from scripts.bench.virtual_time import now
from tests.support.timed_services import TASK, Service, with_pool

# How long a service can be silent before that is noticed, in seconds: each check waits 5 s for its answer.
NOTICED_S = FROZEN_AFTER * (HEALTH_TIMEOUT_S + HEALTH_INTERVAL_S)


def test_a_frozen_service_is_noticed_within_half_a_minute_and_its_task_goes_to_another() -> None:
    """It accepts connections and answers nothing, so that its health is late for ever."""

    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds = 1e6
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        first.status, began = None, now()
        assert (await generating).endpoint == second.endpoint
        assert now() - began <= NOTICED_S + second.seconds + 1 <= 42
        assert pool.usable == {first.endpoint: False, second.endpoint: True}
        assert first.cancelled == 1  # nobody waits for it any more
        first.status = "ready"
        await asyncio.sleep(HEALTH_INTERVAL_S + 0.1)
        assert pool.usable[first.endpoint]

    with_pool(test)


def test_what_a_frozen_service_answers_after_all_is_taken() -> None:
    """By the time that another one works on the task, too."""

    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds, second.seconds = 60.0, 60.0
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        first.status, began = None, now()
        assert (await generating).endpoint == first.endpoint
        assert now() - began <= 60
        assert len(second.asked) == second.cancelled == 1

    with_pool(test)


def test_a_frozen_service_keeps_its_task_while_there_is_no_other() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        second.status = EndpointUnavailable("not reachable")
        await asyncio.sleep(2 * HEALTH_INTERVAL_S)
        first.seconds = 150.0
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        first.status = None
        await asyncio.sleep(NOTICED_S)
        assert not pool.ready.is_set()  # no further task is pulled for it
        assert (await generating).endpoint == first.endpoint
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(60)
        assert len(first.asked) == 1
        assert not second.asked
        second.status, began = "ready", now()  # back again: the task was in the queue
        assert (await generating).endpoint == second.endpoint
        assert now() - began <= HEALTH_INTERVAL_S + second.seconds

    with_pool(test)


def test_a_task_of_a_frozen_service_goes_to_one_that_comes_later() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        second.status = EndpointUnavailable("not reachable")
        await asyncio.sleep(2 * HEALTH_INTERVAL_S)
        first.seconds = 1e6
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        first.status = None
        await asyncio.sleep(100)
        second.status, began = "ready", now()
        assert (await generating).endpoint == second.endpoint
        assert now() - began <= HEALTH_INTERVAL_S + second.seconds

    with_pool(test)


def test_two_frozen_services_are_waited_for_in_time() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds = second.seconds = 1e6
        started = now()
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        first.status = None
        await asyncio.sleep(NOTICED_S)
        second.status = None
        with pytest.raises(AttemptFailed, match="no answer in"):
            await generating
        assert now() - started == pytest.approx(300)
        assert len(first.asked) == len(second.asked) == 1

    with_pool(test)


def test_what_another_service_fails_at_is_not_waited_for_at_a_frozen_one() -> None:
    """The worker tries another seed, with the one that works."""

    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds = 1e6
        second.outcomes.append(AttemptFailed("500"))
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        first.status, began = None, now()
        with pytest.raises(AttemptFailed, match="500"):
            await generating
        assert now() - began <= NOTICED_S

    with_pool(test)


def test_health_that_is_late_twice_gives_no_task_away() -> None:
    async def test(pool: GeneratorPool, first: Service, second: Service) -> None:
        first.seconds = 90.0
        generating = asyncio.create_task(pool.generate(TASK, 1))
        await asyncio.sleep(0.1)
        for status in (None, "ready", None):
            first.status = status
            await asyncio.sleep(20)
        first.status = "ready"
        assert (await generating).endpoint == first.endpoint
        assert not second.asked

    with_pool(test)
