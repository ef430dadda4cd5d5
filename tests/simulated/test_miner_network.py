"""The miner's real parts on a simulated subnet in virtual time: no violation, nothing late, nothing lost."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest

from neurons.chain import Metagraph
from neurons.miner.assignment import USEFUL_AGE_S
from neurons.miner.generation.service import EndpointUnavailable, Generated
from neurons.miner.records.events import Event, Generation, Pull, Settlement, Submission
from neurons.miner.status import IdleLog
from neurons.miner.supervisor import keep_running
from neurons.miner.validators.blacklist import Blacklist
from neurons.miner.validators.clock import UNKNOWN_CLOCK_MARGIN_S
from neurons.miner.validators.dendrite import CONNECTION_LOST, NO_CONNECTION
from neurons.protocol import PULL_TIMEOUT_S, SubmitResults, Task
from neurons.rehearsal.rules import Limits
from scripts.bench import virtual_time
from scripts.bench.miner import AIM, ALL_GOOD, BASE, MIXED, PROMISE, Case, ceiling, simulate
from scripts.bench.simulated_subnet import (
    MINER,
    SPLAT,
    Behaviour,
    MemoryBooks,
    SimulatedNetwork,
    StandInService,
    options_in,
    simulated_miner,
)
from scripts.bench.virtual_time import now
from tests.support.waiting import until

HOUR = 3600.0


class Network(SimulatedNetwork):
    """`down`: no call gets through. `deaf`: calls arrive, answers do not."""

    def __init__(self, behaviours: Sequence[Behaviour], limits: Limits) -> None:
        super().__init__(behaviours, limits)
        self.down = self.deaf = False
        self.calls: list[tuple[str, int, float]] = []
        self.submitted: list[SubmitResults] = []

    async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
        self.calls.append((type(synapse).__name__, target_axon.port, now()))
        if isinstance(synapse, SubmitResults):
            self.submitted.append(synapse)
        status = NO_CONNECTION
        if not self.down:
            synapse = await super().call(target_axon, synapse, timeout, deserialize)
            status = CONNECTION_LOST
        if self.down or self.deaf:
            synapse.axon = bt.TerminalInfo()
            synapse.dendrite = bt.TerminalInfo(status_code=status)
        return synapse


class Books(MemoryBooks):
    breaks: type[Event] | None = None  # breaks whoever records the next one of these

    def record(self, event: Event) -> None:
        if self.breaks is not None and isinstance(event, self.breaks):
            self.breaks = None
            raise RuntimeError("broken on purpose")
        super().record(event)


class Miner:
    """The assembled parts, with what tests look at and change."""

    def __init__(self, network: Network, folder: Path, services: Sequence[Any], **options: Any) -> None:
        self.network = network
        self.books = Books()
        self.events = self.books.events
        self.blacklist_file = folder / "blacklist"
        self.blacklist = Blacklist((), self.blacklist_file)
        self._options = replace(options_in(folder), spool=folder, **options)
        self._services = services
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        parts = await simulated_miner(self._options, self.network, self._services, self.books, self.blacklist)
        self.directory, self.pool, self.manager = parts.directory, parts.pool, parts.manager
        running = [self.pool.watch, *(worker.run for worker in parts.workers)]
        self.tasks = [asyncio.create_task(keep_running("A part", part)) for part in running]

    async def kill(self) -> None:
        """As far as one process can: everything stops where it stands."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def count(self, kind: type[Event], outcome: str) -> int:
        return sum(isinstance(event, kind) and event.outcome == outcome for event in self.events)

    def outcomes(self) -> Counter[str]:
        """What the miner believes of its results, each counted once."""
        believed: dict[str, str] = {}
        for event in self.events:
            if isinstance(event, Submission):
                assert event.task_id not in believed
                believed[event.task_id] = event.outcome
            elif isinstance(event, Settlement):
                assert believed[event.task_id] == "unknown"
                believed[event.task_id] = event.outcome
        return Counter(believed.values())


@asynccontextmanager
async def mining(network: Network, folder: Path, *services: Any, **options: Any):  # type: ignore[no-untyped-def]
    miner = Miner(network, folder, services or [StandInService(20.0, 4)], **options)
    await miner.start()
    try:
        yield miner
    finally:
        await miner.kill()


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    virtual_time.run(test())


def limits(cooldown: float = 300.0, throttle: float = 30.0) -> Limits:
    return replace(Limits(), task_cooldown=cooldown, throttle_period=throttle)


def violations(network: SimulatedNetwork) -> int:
    return sum(validator.violations for validator in network.validators)


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


# --- validators that move, leave, or are put on the blacklist


def test_a_validator_that_moved_is_asked_and_answered_at_its_new_address(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network([Behaviour(), Behaviour()], limits())
        async with mining(network, tmp_path) as miner:
            await asyncio.sleep(5)
            # Both validators move while their tasks are in work: what was the one's is the other's address now.
            first, second = network.validators
            network.validators.reverse()
            first.neuron, second.neuron = (
                replace(first.neuron, port=second.neuron.port),
                replace(second.neuron, port=first.neuron.port),
            )
            miner.directory.update(network.metagraph())
            miner.manager.sync()
            await asyncio.sleep(60)
            assert first.accepted == second.accepted == 1

    in_virtual_time(test)


@pytest.mark.parametrize("after", [1.0, PULL_TIMEOUT_S + 60])
def test_a_dead_validator_that_moves_is_asked_at_once(tmp_path: Path, after: float) -> None:
    """Or when the pull that is under way to its old address has failed."""

    async def test() -> None:
        network = Network([Behaviour(dead=True)], limits())
        async with mining(network, tmp_path) as miner:
            await asyncio.sleep(HOUR)
            calls = len(network.calls)
            await until(lambda: len(network.calls) > calls, HOUR, every=1.0)
            await asyncio.sleep(after)
            neuron = replace(network.validators[0].neuron, ip="127.0.0.2")
            before = len(network.calls)
            miner.directory.update(Metagraph(17, (neuron,)))
            miner.manager.sync()
            await asyncio.sleep(1 if after > PULL_TIMEOUT_S else PULL_TIMEOUT_S)
            assert len(network.calls) == before + 1

    in_virtual_time(test)


@pytest.mark.parametrize("how", ["leaves", "loses stake", "blacklisted"])
def test_one_that_is_not_eligible_any_more_gets_its_result_and_is_left_alone(tmp_path: Path, how: str) -> None:
    async def test() -> None:
        network = Network([Behaviour(), Behaviour()], limits())
        async with mining(network, tmp_path) as miner:
            await asyncio.sleep(5)
            gone, stays = network.validators
            if how == "blacklisted":
                miner.blacklist_file.write_text(gone.hotkey)
                miner.blacklist.reload()
                miner.directory.refresh()
            else:
                poor = () if how == "leaves" else (replace(gone.neuron, stake=10.0),)
                miner.directory.update(Metagraph(17, (stays.neuron, *poor)))
            miner.manager.sync()
            await asyncio.sleep(HOUR)
            assert gone.accepted == 1
            assert stays.accepted >= 11
            pulls = Counter(port for name, port, _ in network.calls if name == "PullTask")
            assert pulls[gone.neuron.port] == 1
            # It comes back within its cooldown.
            gone.rules.miners[MINER.ss58_address].cooldown_until = gone.clock() + 200
            miner.blacklist_file.write_text("")
            miner.blacklist.reload()
            miner.directory.update(network.metagraph())
            miner.manager.sync()
            await asyncio.sleep(600)
            assert gone.accepted >= 2

    in_virtual_time(test)


def test_coming_and_going_is_no_way_around_a_cooldown(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network([Behaviour()], limits())
        async with mining(network, tmp_path) as miner:
            for _ in range(100):
                await asyncio.sleep(30)
                miner.directory.update(Metagraph(17, ()))
                miner.manager.sync()
                await asyncio.sleep(1)
                miner.directory.update(network.metagraph())
                miner.manager.sync()
            assert violations(network) == 0
            assert network.validators[0].accepted >= 9

    in_virtual_time(test)


@pytest.mark.parametrize("doing", ["waits out a cooldown", "is left alone", "ends"])
def test_a_validator_that_leaves_and_returns_at_once_keeps_its_poller(tmp_path: Path, doing: str) -> None:
    """Within one turn of the event loop, and no synchronisation comes to the rescue for an hour."""

    async def test() -> None:
        network = Network([Behaviour()], limits())
        service = StandInService(20.0, 4)
        async with mining(network, tmp_path, service) as miner:
            (validator,) = network.validators
            await asyncio.sleep(100)
            if doing == "is left alone":
                network.down = True
                await asyncio.sleep(HOUR)
                network.down = False
                assert miner.manager.silent == 1
            before = validator.accepted
            if doing == "ends":
                miner.pool.ready.clear()
                await asyncio.sleep(300)  # the cooldown is over, and nobody can generate
            miner.directory.update(Metagraph(17, ()))
            miner.manager.sync()
            if doing == "ends":
                miner.pool.ready.set()
                await asyncio.sleep(0)
            miner.directory.update(network.metagraph())
            miner.manager.sync()
            await asyncio.sleep(HOUR)
            assert validator.accepted - before >= 11
        assert violations(network) == 0

    in_virtual_time(test)


def test_it_is_said_when_nobody_is_left_to_ask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neurons.miner.status")

    async def test() -> None:
        network = Network([Behaviour(), Behaviour(), Behaviour(dead=True)], limits())
        async with mining(network, tmp_path) as miner:
            idle_log = IdleLog(now)
            for _ in range(60):
                await asyncio.sleep(1)
                idle_log.update(miner.manager, len(miner.directory.eligible))
        lines = [record.getMessage() for record in caplog.records if record.name == "neurons.miner.status"]
        assert len(lines) == 1
        assert lines[0].startswith("No available validators: 2 on cooldown")
        assert "1 not answering" in lines[0]

    in_virtual_time(test)


def test_validators_that_are_all_silent_have_no_next_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neurons.miner.status")

    async def test() -> None:
        network = Network([Behaviour(dead=True)], limits())
        async with mining(network, tmp_path) as miner:
            idle_log = IdleLog(now)
            for _ in range(40):
                await asyncio.sleep(1)
                idle_log.update(miner.manager, len(miner.directory.eligible))
        assert "No available validators: 1 not answering" in [record.getMessage() for record in caplog.records]

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


# --- other seeds


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
