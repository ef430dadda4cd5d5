"""The miner's parts over services that reject, hang, or come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from neurons.miner.assignment import USEFUL_AGE_S
from neurons.miner.generation.service import EndpointUnavailable, Generated
from neurons.miner.records.events import Generation, Pull, Submission
from neurons.protocol import Task
from scripts.bench.miner import ALL_GOOD
from scripts.bench.simulated_subnet import (
    SPLAT,
    Behaviour,
    StandInService,
)
from scripts.bench.virtual_time import now
from tests.support.mining import HOUR, Network, in_virtual_time, limits, mining, violations


class Rejecting:
    """A service whose first results are rejected."""

    endpoint = "http://rejecting"

    def __init__(self, rejections: int, seconds: float) -> None:
        self.rejections = rejections
        self.seconds = seconds
        self.seeds: list[int] = []

    async def health(self) -> str | None:
        return "ready"

    async def generate(self, task: Task, seed: int, *effort: Any) -> Generated:
        self.seeds.append(seed)
        await asyncio.sleep(self.seconds)
        if len(self.seeds) <= self.rejections:
            return Generated(b"", 0.3, str(seed), "score 0.30 under 0.60")
        return Generated(SPLAT, 0.8, str(seed), "")


@pytest.mark.parametrize(
    ("rejections", "seconds", "attempts", "outcome"),
    [
        (2, 20.0, 3, "accepted"),
        (3, 20.0, 3, "empty"),  # two retries and no more
        (1, 150.0, 1, "empty"),  # no time for another one
        (1, 100.0, 2, "accepted"),
    ],
)
def test_a_rejected_result_is_tried_again_in_time(
    tmp_path: Path, rejections: int, seconds: float, attempts: int, outcome: str
) -> None:
    async def test() -> None:
        network = Network([Behaviour()], limits(3000))
        service = Rejecting(rejections, seconds)
        async with mining(network, tmp_path, service) as miner:
            await asyncio.sleep(400)
            assert miner.count(Submission, outcome) == 1
            assert len(service.seeds) == len(set(service.seeds)) == attempts
            assert miner.count(Generation, "rejected") == min(rejections, attempts)

    in_virtual_time(test)


class Hanging(Rejecting):
    """As `Rejecting`, and then it does not answer any more."""

    async def generate(self, task: Task, seed: int, *effort: Any) -> Generated:
        if len(self.seeds) == self.rejections:
            self.seconds = 1e6
        return await super().generate(task, seed, *effort)


@pytest.mark.parametrize("rejections", [0, 1])
def test_a_service_that_hangs_keeps_no_validator_for_longer_than_a_task_is_worth(
    tmp_path: Path, rejections: int
) -> None:
    """Each second past 30 delays the next task by one, be it spent on the first seed or on another."""

    async def test() -> None:
        network = Network([Behaviour()], limits())
        async with mining(network, tmp_path, Hanging(rejections, 100.0)) as miner:
            await asyncio.sleep(USEFUL_AGE_S - 1)
            assert network.submitted == []
            await asyncio.sleep(10)
            assert [submission.results for submission in network.submitted] == [""]
            assert miner.count(Generation, "rejected") == rejections
            assert miner.count(Generation, "failed") == miner.count(Submission, "empty") == 1
        assert violations(network) == 0

    in_virtual_time(test)


class Flaky(StandInService):
    """Gone every other minute."""

    async def health(self) -> str | None:
        if now() % 120 < 60:
            raise EndpointUnavailable("gone")
        return "ready"

    async def generate(self, task: Task, seed: int, *effort: Any) -> Generated:
        if now() % 120 < 60:
            raise EndpointUnavailable("gone")
        return await super().generate(task, seed, *effort)


def test_services_that_come_and_go_lose_no_task(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network(ALL_GOOD[:4], limits())
        async with mining(network, tmp_path, Flaky(20.0, 4, "http://a"), Flaky(20.0, 4, "http://b")) as miner:
            await asyncio.sleep(HOUR)
            in_hand = len(miner.manager.held)
            assert miner.count(Submission, "accepted") + in_hand == miner.count(Pull, "task")
            assert miner.count(Submission, "accepted") >= 4 * 9
        assert violations(network) == 0

    in_virtual_time(test)
