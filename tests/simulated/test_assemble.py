"""The miner as it is assembled and run in production, in virtual time: what is wired to what.

Each of these was once wired wrong, or not at all, and no other fast test noticed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neurons.chain import Metagraph
from neurons.miner import keys
from neurons.miner.app import CompetitiveMiner
from neurons.miner.assemble import Miner, assemble, open_books
from neurons.miner.assignment import USEFUL_AGE_S, usable_threshold
from neurons.miner.generation.service import EndpointUnavailable, Generated
from neurons.miner.options import MinerOptions
from neurons.miner.records.bookkeeping import Bookkeeping
from neurons.miner.records.events import Event, Generation, Pull, Settlement, Submission
from neurons.miner.records.metrics import Metrics, Snapshot
from neurons.miner.submission.spool import Spool, SpooledResult
from neurons.miner.validators.blacklist import Blacklist
from neurons.protocol import Feedback, Task, TextTask
from neurons.rehearsal.rules import Limits
from scripts.bench.simulated_subnet import MINER, Behaviour, SimulatedNetwork, StandInService, options_in
from scripts.bench.virtual_time import now
from tests.support.mining import in_virtual_time

GENERATION_S = 10.0


class Service(StandInService):
    """`score` is what it says of each splat."""

    score = 0.8

    async def generate(self, task: Task, seed: int, *effort: Any) -> Generated:
        return replace(await super().generate(task, seed, *effort), score=self.score)


class Run:
    """One life of the miner's process. `events` has what is recorded in it."""

    def __init__(self, miner: Miner, books: Bookkeeping, app: CompetitiveMiner) -> None:
        self.parts, self.books = miner, books
        self.events: list[Event] = []
        self._app = app
        self._running = asyncio.create_task(app.mine(miner, books))

    async def stop(self) -> None:
        self._app.stop()
        async with asyncio.timeout(60):
            await self._running

    def of(self, kind: type[Event]) -> list[str]:
        return [event.outcome for event in self.events if isinstance(event, kind)]


@contextlib.asynccontextmanager
async def mining(
    network: SimulatedNetwork, options: MinerOptions, service: Service | None = None
) -> AsyncIterator[Run]:
    events: list[Event] = []
    books = open_books(options, MINER.ss58_address, now)
    into_the_ledger = books.record

    def record(event: Event) -> None:
        events.append(event)
        into_the_ledger(event)

    books.record = record  # type: ignore[method-assign]
    blacklist = Blacklist(options.blacklist, options.blacklist_file)
    blacklist.load()
    miner = await assemble(
        *(options, MINER),
        dendrite=network,
        services=[service or Service(GENERATION_S, 4)],
        fetch=network.fetch,
        blacklist=blacklist,
        books=books,
        now=now,
    )
    run = Run(miner, books, CompetitiveMiner(options))
    run.events = events
    try:
        yield run
    finally:
        await run.stop()


async def earlier_run(options: MinerOptions, events: Sequence[Event]) -> None:
    """Leaves a ledger, and takes as long as its generations took."""
    books = open_books(options, MINER.ss58_address, now)
    books.start()
    for event in events:
        await asyncio.sleep(event.seconds if isinstance(event, Generation) else 0)
        books.record(event)
    await books.close()


# --- start and stop


def test_what_is_under_way_at_a_stop_is_seen_through(tmp_path: Path) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour(validation=5.0)], Limits())
        async with mining(network, replace(options_in(tmp_path), best_of=1)) as run:
            await asyncio.sleep(GENERATION_S + 3)
            assert len(network.validators[0].held) == 1
            assert not run.of(Submission)
        assert run.of(Submission) == ["accepted"]
        assert run.parts.spool.entries() == []

    in_virtual_time(test)


def test_what_is_in_generation_at_a_stop_is_handed_in(tmp_path: Path) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        async with mining(network, options_in(tmp_path)) as run:
            await asyncio.sleep(3)
            assert run.of(Pull) == ["task"]
            assert not run.of(Generation)
        assert run.of(Submission) == ["accepted"]

    in_virtual_time(test)


def test_a_stop_hands_in_a_fit_result_and_waits_for_no_better_one(tmp_path: Path) -> None:
    class SlowLater(Service):
        """After the first task's only candidate and the second one's first: a round that lasts."""

        async def generate(self, task: Task, seed: int, *effort: Any) -> Generated:
            if self.generated == 2:
                await asyncio.sleep(100)
            return await super().generate(task, seed, *effort)

    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        async with mining(network, options_in(tmp_path), SlowLater(GENERATION_S, 1)) as run:
            await asyncio.sleep(Limits().task_cooldown + GENERATION_S + 3)
            assert run.of(Submission) == ["accepted"]
            stopped_at = now()
            await run.stop()
            assert now() - stopped_at < 3
        assert run.of(Submission) == ["accepted"] * 2

    in_virtual_time(test)


def test_a_stop_does_not_wait_for_a_service_that_is_gone(tmp_path: Path) -> None:
    class Gone(Service):
        async def generate(self, task: Task, seed: int, *effort: Any) -> Generated:
            raise EndpointUnavailable("gone", 200.0)

    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        async with mining(network, options_in(tmp_path), Gone(GENERATION_S, 4)) as run:
            await asyncio.sleep(10)
            assert len(run.parts.manager.working) == 1
            stopped_at = now()
            await run.stop()
            assert now() - stopped_at < 1

    in_virtual_time(test)


def test_what_was_recorded_last_is_in_the_ledger_after_a_stop(tmp_path: Path) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour(dead=True)], Limits())
        options = options_in(tmp_path)
        (validator,) = network.validators
        async with mining(network, options) as run:
            await asyncio.sleep(1)
            for _ in range(5000):
                run.books.record(Pull(validator.neuron, "refused", 0.1))
        with closing(sqlite3.connect(options.ledger_of(MINER.ss58_address))) as connection:
            assert connection.execute("SELECT count(*) FROM pulls WHERE outcome = 'refused'").fetchone() == (5000,)

    in_virtual_time(test)


def test_the_status_file_says_how_things_are_until_the_stop(tmp_path: Path) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        file = tmp_path / "status"
        async with mining(network, replace(options_in(tmp_path), status_file=file)):
            await asyncio.sleep(30)
            said = json.loads(file.read_text())
        assert (said["status"], said["validators"]) == ("ready", 1)
        assert said["totals"] == {"pull task": 1, "generation generated": 1, "submission accepted": 1}

    in_virtual_time(test)


def test_a_stop_while_there_is_no_rehearsal_yet_begins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "load", None)

    async def test() -> None:
        file = tmp_path / "status"
        miner = CompetitiveMiner(replace(options_in(tmp_path), rehearsal_state=tmp_path / "none", status_file=file))
        running = asyncio.create_task(miner.run())
        await asyncio.sleep(10)
        assert json.loads(file.read_text())["status"] == "waiting for the rehearsal"
        miner.stop()
        assert await running == 0
        assert not file.exists()

    in_virtual_time(test)


def test_the_metrics_say_how_things_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Snapshot] = []
    monkeypatch.setattr(Metrics, "show", lambda _, snapshot: shown.append(snapshot))

    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        async with mining(network, options_in(tmp_path)):
            await asyncio.sleep(30)
            assert shown[-1].endpoints == {"http://stand-in": True}
            assert list(shown[-1].cooldowns) == [network.validators[0].neuron.uid]

    in_virtual_time(test)


def test_cooldowns_outlast_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour(), Behaviour()], Limits())
        async with mining(network, options_in(tmp_path)) as run:
            await asyncio.sleep(30)
            assert run.of(Submission) == ["accepted"] * 2
        async with mining(network, options_in(tmp_path)) as run:
            await asyncio.sleep(60)
            assert run.of(Pull) == []
            await asyncio.sleep(300)
            assert run.of(Pull) == ["task"] * 2
        assert [each.violations for each in network.validators] == [0, 0]

    in_virtual_time(test)


def test_what_validators_counted_outlasts_a_restart(tmp_path: Path) -> None:
    """Of the result whose answer was lost before the restart, the count tells after it."""

    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        options = options_in(tmp_path)
        (validator,) = network.validators
        told = Feedback(task_fidelity_score=0.8, generations_within_the_window=0)
        await earlier_run(
            options,
            [
                Submission(validator.neuron, "before", "empty", 1.0, 0, told, now() + 10),
                Submission(validator.neuron, "lost", "unknown", 1.0, 10, None, now() + 20),
            ],
        )
        async with mining(network, options) as run:
            await asyncio.sleep(60)
            assert run.of(Submission) == ["accepted"]
            assert [event.task_id for event in run.events if isinstance(event, Settlement)] == ["lost"]

    in_virtual_time(test)


def test_the_spool_of_an_earlier_run_is_known(tmp_path: Path) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour(dead=True)], Limits())
        options = replace(options_in(tmp_path), spool=tmp_path / "elsewhere")
        (validator,) = network.validators
        kept = SpooledResult(validator.hotkey, TextTask(id="kept", prompt="p"), b"result")
        Spool(tmp_path / "elsewhere").put(kept)
        async with mining(network, options) as run:
            assert run.parts.submitter.keeps_for(validator.hotkey)

    in_virtual_time(test)


# --- options


def test_a_validator_that_earns_too_little_is_left_alone(tmp_path: Path) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour(), Behaviour()], Limits())
        options = replace(options_in(tmp_path), min_reward=0.02)
        events: list[Event] = []
        for validator, outcome in zip(network.validators, ("accepted", "declined"), strict=True):
            for number in range(12):
                task = TextTask(id=f"{validator.hotkey} {number}", prompt="p")
                told = Feedback(task_fidelity_score=0.8)
                events += [
                    Pull(validator.neuron, "task", 0.1, task.id),
                    Generation(validator.neuron, task, "generated", 20.0, 0.8, 10, "http://stand-in"),
                    Submission(validator.neuron, task.id, outcome, 1.0, 10, told, now()),  # type: ignore[arg-type]
                ]
        await earlier_run(options, events)
        async with mining(network, options):
            await asyncio.sleep(1200)
        pays, pays_not = network.validators
        # The first pulls go out beside the first look at the ledger.
        assert len(pays.held) >= 3
        assert len(pays_not.held) <= 1

    in_virtual_time(test)


@pytest.mark.parametrize("retries", [0, 3])
def test_so_many_other_seeds_are_tried(tmp_path: Path, retries: int) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        service = Service(GENERATION_S, 4)
        service.score = 0.2
        async with mining(network, replace(options_in(tmp_path), best_of=1, retries=retries), service) as run:
            await asyncio.sleep(100)
            assert run.of(Generation) == ["rejected"] * (retries + 1)
            assert run.of(Submission) == ["empty"]

    in_virtual_time(test)


@pytest.mark.parametrize(
    ("announced", "own", "score", "outcome"),
    [
        (0.6, 0.7, 0.65, "rejected"),
        (0.7, 0.6, 0.65, "rejected"),
        (0.6, 0.7, 0.7, "generated"),  # reached is enough
        (0.7, 0.6, 0.7, "generated"),
        (1.0, 0.6, 0.99, "rejected"),  # can be reached
        (1.0, 0.6, 1.0, "generated"),
        (1.01, 0.6, 0.6, "generated"),  # can not
    ],
)
def test_the_score_to_reach(tmp_path: Path, announced: float, own: float, score: float, outcome: str) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], replace(Limits(), validation_threshold=announced))
        service = Service(GENERATION_S, 4)
        service.score = score
        async with mining(
            network, replace(options_in(tmp_path), validation_threshold=own, best_of=1, retries=0), service
        ) as run:
            await asyncio.sleep(60)
            assert run.of(Generation) == [outcome]

    in_virtual_time(test)


def test_a_threshold_of_one_counts() -> None:
    assert usable_threshold(1.0, 0.6) == 1.0
    assert usable_threshold(1.0 + 1e-9, 0.6) == 0.6


@pytest.mark.parametrize("workers", [1, 6])
def test_so_many_tasks_are_in_generation_at_once(tmp_path: Path, workers: int) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour()] * 8, Limits())
        async with mining(network, replace(options_in(tmp_path), workers=workers), Service(60.0, 10)) as run:
            await asyncio.sleep(20)
            assert len(run.parts.manager.working) == workers
            assert len(run.of(Pull)) == workers  # as long as nothing is measured

    in_virtual_time(test)


def test_no_more_is_pulled_than_is_generated_in_time(tmp_path: Path) -> None:
    """By how long a task was measured to take: 200 s for two, 300 s for three."""

    async def test() -> None:
        network = SimulatedNetwork([Behaviour()] * 8, Limits())
        async with mining(network, replace(options_in(tmp_path), workers=1), Service(100.0, 1)) as run:
            await asyncio.sleep(150)
            assert run.of(Generation) == ["generated"]
            assert len(run.parts.manager.held) == 2

    in_virtual_time(test)


def test_a_generation_is_given_up_when_its_task_has_become_too_old(tmp_path: Path) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        async with mining(network, replace(options_in(tmp_path), retries=0), Service(1000.0, 1)) as run:
            await asyncio.sleep(USEFUL_AGE_S + 2)
            assert run.of(Generation) == ["failed"]

    in_virtual_time(test)


@pytest.mark.parametrize(("chain", "least", "most"), [("rehearsal", 15, 25), ("ws://127.0.0.1:9944", 4, 8)])
def test_a_chain_is_asked_less_often_than_a_rehearsal_and_trusted_less(
    tmp_path: Path, chain: str, least: int, most: int
) -> None:
    """On a chain nobody is asked at 127.0.0.1, so none is eligible here, and it is read again after 2, 4, 8, ... s."""

    async def test() -> None:
        network = SimulatedNetwork([Behaviour()], Limits())
        reads = 0

        async def fetch() -> Metagraph:
            nonlocal reads
            reads += 1
            return network.metagraph()

        network.fetch = fetch  # type: ignore[method-assign]
        options = replace(options_in(tmp_path), network=chain, spool=tmp_path / "s", ledger=tmp_path / "l")
        async with mining(network, options) as run:
            await asyncio.sleep(100)
            assert least <= reads <= most
            assert len(run.parts.directory.eligible) == (chain == "rehearsal")

    in_virtual_time(test)


def test_the_blacklist_s_file_is_followed(tmp_path: Path) -> None:
    async def test() -> None:
        file = tmp_path / "blacklist"
        file.write_text("0\n")
        network = SimulatedNetwork([Behaviour(), Behaviour(), Behaviour()], Limits())
        options = replace(options_in(tmp_path), blacklist=frozenset({1}), blacklist_file=file)
        async with mining(network, options) as run:
            await asyncio.sleep(100)
            assert [len(each.held) for each in network.validators] == [0, 0, 1]
            file.write_text("2 # from now on\n")
            await asyncio.sleep(10)
            assert [each.uid for each in run.parts.directory.eligible.values()] == [0]
            await asyncio.sleep(400)
            assert [len(each.held) > 0 for each in network.validators] == [True, False, True]
            assert len(network.validators[2].held) == 1

    in_virtual_time(test)


# --- clocks


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_validators_clocks_are_learned_from_their_date_headers(tmp_path: Path, offset: float) -> None:
    async def test() -> None:
        network = SimulatedNetwork([Behaviour(clock_offset=offset)] * 3, Limits())
        async with mining(network, options_in(tmp_path)) as run:
            await asyncio.sleep(1500)
            assert run.parts.clocks.machine_is_behind() is not None
            hotkey = network.validators[0].hotkey
            assert network.seconds_ahead(hotkey) == pytest.approx(offset, abs=4)
        assert [each.violations for each in network.validators] == [0, 0, 0]
        assert all(len(each.held) >= 5 for each in network.validators)

    in_virtual_time(test)
