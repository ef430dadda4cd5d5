"""Validators that keep the rules and are troublesome all the same, and the comparison of a ledger with their books."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest

from neurons.chain import Neuron
from neurons.miner.app import CompetitiveMiner
from neurons.miner.validators.dendrite import ValidatorDendrite
from neurons.protocol import PullTask, Task, make_submission
from neurons.rehearsal.network import RehearsalNetwork, make_wallet
from neurons.rehearsal.rules import Limits, Rules
from neurons.rehearsal.scoring import FixedScores
from neurons.rehearsal.troubles import TROUBLES
from neurons.rehearsal.truth import TruthFile
from neurons.rehearsal.validator import RehearsalValidator
from scripts.tools.compare_with_truth import agree, compare, read_ledger, read_truth
from tests.support.miner_harness import PROMPTS, StandInService, options
from tests.support.waiting import until

KEYPAIR = bt.Keypair.create_from_uri("//miner")
# A task every 3 s, a lock of 0.3 s.
LIMITS = Limits().compressed(100)
SECONDS = 45.0


@dataclass
class Client:
    """A miner's calls to one validator."""

    validator: RehearsalValidator
    dendrite: ValidatorDendrite
    truth_file: Path

    async def call(self, synapse: Any) -> Any:
        axon = Neuron(1, self.validator.hotkey, "127.0.0.1", self.validator.port, 1e4, True).axon_info()
        return await self.dendrite.call(axon, synapse, timeout=10, deserialize=False)

    async def pull(self) -> Any:
        return await self.call(PullTask())

    async def submit(self, task: Task, result: bytes = b"x") -> Any:
        return await self.call(make_submission(task, result, self.validator.hotkey, KEYPAIR))

    async def task(self) -> Task:
        """The next one, without waiting for the cooldown's end."""
        miner = self.validator.rules.miners[KEYPAIR.ss58_address]
        miner.cooldown_until = miner.last_accepted_at = miner.locked_until = 0.0
        task = (await self.pull()).task
        assert task is not None
        return task

    def truth(self, event: str) -> list[dict[str, Any]]:
        notes = [json.loads(line) for line in self.truth_file.read_text().splitlines()]
        return [note for note in notes if note["event"] == event]

    def outcomes(self) -> list[str]:
        return [note["outcome"] for note in self.truth("submission")]


@asynccontextmanager
async def troubled(kind: str, folder: Path, limits: Limits = LIMITS) -> AsyncIterator[Client]:
    known_from = time.time() + TROUBLES[kind].unknown_seconds * limits.second if kind else 0.0
    rules = Rules(limits, [KEYPAIR.ss58_address], iter(PROMPTS), known_from=known_from)
    truth, state = folder / "truth.jsonl", folder / "state.json"
    wallet = make_wallet(folder, "validator")
    validator = RehearsalValidator(7, wallet, rules, FixedScores(0.8), kind, state, TruthFile(truth))
    serving = asyncio.create_task(validator.serve())
    await until(lambda: validator.started)
    try:
        async with ValidatorDendrite(KEYPAIR) as dendrite:
            yield Client(validator, dendrite, truth)
    finally:
        validator.stop()
        await serving


@pytest.mark.parametrize(
    ("kind", "outcome", "validation_failed", "penalty"),
    [
        ("declines", "declined", False, 6.0),
        ("scoring-raises", "declined", False, 6.0),
        ("scoring-unavailable", "broken", True, 0.0),
        ("", "accepted", False, 0.0),
    ],
)
async def test_scores(kind: str, outcome: str, validation_failed: bool, penalty: float, tmp_path: Path) -> None:
    async with troubled(kind, tmp_path) as client:
        task = await client.task()
        answer = await client.submit(task)
        assert answer.feedback.validation_failed is validation_failed
        assert answer.feedback.task_fidelity_score == (0.8 if outcome == "accepted" else 0.0)
        assert 1.0 <= answer.cooldown_until - time.time() - penalty <= 4.0
        assert (await client.submit(task)).axon.status_code == 403
        assert client.outcomes() == [outcome, "refused"]
        note = client.truth("submission")[0]
        assert (note["uid"], note["task"], note["miner"]) == (7, task.id, KEYPAIR.ss58_address)


async def test_the_lock(tmp_path: Path) -> None:
    limits = Limits().compressed(50)
    async with troubled("locks", tmp_path, limits) as client:
        task = await client.task()
        assert not (await client.submit(task)).is_success  # the connection is dropped, and the result is scored
        repetition = await client.submit(task)
        assert repetition.is_success
        assert repetition.feedback is not None
        assert repetition.cooldown_until == 0
        assert client.outcomes() == ["repetition"]
        await until(lambda: len(client.outcomes()) == 2)
        assert [note["reason"] for note in client.truth("submission")] == ["lock", ""]
        assert client.outcomes() == ["repetition", "accepted"]
        assert client.truth("submission")[1]["lost"]


async def test_two_that_overlap(tmp_path: Path) -> None:
    async with troubled("overlaps", tmp_path) as client:
        task = await client.task()
        assert not (await client.submit(task)).is_success
        await asyncio.sleep(0.35)
        assert not (await client.submit(task)).is_success  # past the lock: scored, too
        await until(lambda: len(client.outcomes()) == 2)
        assert client.outcomes() == ["accepted", "repetition"]
        assert client.truth("submission")[1]["reason"] == "overlap"
        assert client.truth("submission")[1]["window"] == 1


async def test_an_answer_that_is_lost(tmp_path: Path) -> None:
    async with troubled("loses-answers", tmp_path) as client:
        task = await client.task()
        assert not (await client.submit(task)).is_success
        assert (await client.submit(task)).axon.status_code == 403
        assert client.outcomes() == ["accepted", "refused"]
        assert client.truth("submission")[0]["lost"]


async def test_a_crash_without_state(tmp_path: Path) -> None:
    async with troubled("crashes-without-state", tmp_path) as client:
        for _ in range(2):
            await client.submit(await client.task())
        task = await client.task()
        await until(lambda: client.truth("crash"))
        await asyncio.sleep(0.3)
        assert (await client.submit(task)).axon.status_code == 403
        # It has forgotten the cooldown, too.
        other = (await client.pull()).task
        assert other is not None
        assert other.id != task.id
        answer = await client.submit(other)
        assert answer.feedback.generations_within_the_window == 1


async def test_a_crash_with_old_state(tmp_path: Path) -> None:
    async with troubled("crashes-with-old-state", tmp_path) as client:
        for _ in range(2):
            await client.submit(await client.task())
        task = await client.task()
        assert (await client.submit(task)).feedback.generations_within_the_window == 3
        await until(lambda: client.truth("crash"))
        await asyncio.sleep(0.3)
        assert await client.task() == task
        assert (await client.submit(task)).feedback.generations_within_the_window == 3
        await asyncio.sleep(0.3)
        assert len(client.truth("crash")) == 1
        assert read_truth([client.truth_file])[7, task.id] == ["accepted", "accepted"]


async def test_a_miner_that_is_not_known_yet(tmp_path: Path) -> None:
    async with troubled("knows-nobody-yet", tmp_path) as client:
        answer = await client.pull()
        assert answer.task is None
        assert 35 <= answer.cooldown_until - time.time() <= 37
        assert [note["violations"] for note in client.truth("unregistered")] == [0]


async def test_the_state_survives_a_clean_end(tmp_path: Path) -> None:
    async with troubled("", tmp_path) as client:
        task = await client.task()
    async with troubled("", tmp_path) as client:
        assert (await client.pull()).task == task
    (tmp_path / "state.json").write_text("{")
    async with troubled("", tmp_path) as client:
        assert (await client.pull()).task not in (None, task)


# --- the comparison


@pytest.mark.parametrize(
    ("ledger", "truth", "agreed"),
    [
        (["accepted"], ["accepted"], True),
        (["accepted"], ["declined"], False),
        (["accepted"], [], False),
        ([], ["accepted"], False),
        (["unknown"], ["accepted"], True),
        (["unknown"], [], True),
        (["refused"], [], True),
        (["refused"], ["accepted"], False),
        (["given_up"], [], True),
        (["accepted", "accepted"], ["accepted", "accepted"], True),
        (["accepted", "unknown"], ["broken", "accepted"], True),
        (["declined", "unknown"], ["broken", "accepted"], False),
        (["accepted", "declined"], ["accepted"], False),
    ],
)
def test_agreement(ledger: list[str], truth: list[str], agreed: bool) -> None:
    assert agree(ledger, truth) is agreed


def test_comparing_files(tmp_path: Path) -> None:
    def note(uid: int, event: str, task: str = "", outcome: str = "") -> str:
        return json.dumps({"uid": uid, "event": event, "task": task, "outcome": outcome})

    (tmp_path / "truth.jsonl").write_text(
        "\n".join(
            [
                *(note(1, "start"), note(1, "assigned", "a"), note(1, "submission", "a", "repetition")),
                *(note(1, "submission", "a", "declined"), note(1, "submission", "a", "accepted")),
                *(note(1, "submission", "a", "broken"), note(1, "crash"), note(1, "submission", "a", "empty")),
                *(note(1, "submission", "b", "declined"), note(2, "submission", "b", "accepted")),
            ]
        )
    )
    truth = read_truth([tmp_path / "truth.jsonl"])
    assert truth == {(1, "a"): ["accepted", "empty"], (1, "b"): ["declined"], (2, "b"): ["accepted"]}
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("CREATE TABLE submissions (id INTEGER PRIMARY KEY, uid, task_id, outcome)")
        rows = [(1, "a", "accepted"), (1, "a", "empty"), (1, "b", "accepted"), (2, "b", "accepted"), (3, "c", "empty")]
        connection.executemany("INSERT INTO submissions VALUES (NULL, ?, ?, ?)", rows)
    comparison = compare(read_ledger(tmp_path / "ledger.sqlite"), truth)
    (difference,) = comparison.differences
    assert (difference.uid, difference.task_id, difference.ledger) == (1, "b", ("accepted",))
    assert comparison.truth[1] == {"accepted": 1, "empty": 1, "declined": 1}
    assert 3 not in comparison.ledger


@pytest.mark.slow
async def test_the_ledger_says_what_the_validators_did(tmp_path: Path) -> None:
    limits = Limits().compressed(60)
    truth_file = tmp_path / "truth.jsonl"
    async with StandInService() as service:
        network = RehearsalNetwork(
            tmp_path / "rehearsal", service.endpoint, 3, limits, PROMPTS, list(TROUBLES), truth=truth_file
        )
        await asyncio.to_thread(network.__enter__)
        mine = options(tmp_path, service.endpoint)
        miner = CompetitiveMiner(mine)
        running = asyncio.create_task(miner.run())
        try:
            await asyncio.sleep(SECONDS)
            miner.stop()
            assert await asyncio.wait_for(running, 40) == 0
        finally:
            miner.stop()
            await asyncio.to_thread(network.__exit__)
    assert mine.ledger is not None
    comparison = compare(read_ledger(mine.ledger), read_truth([truth_file]))
    total = sum(comparison.truth.values(), start=type(comparison.truth[1])())
    print(dict(total), comparison.ledger, comparison.differences)
    assert min(total[outcome] for outcome in ("accepted", "declined", "broken")) >= 5
    unknown = sum(each["unknown"] for each in comparison.ledger.values())
    assert unknown <= 0.1 * total.total()
    # What was under way when the miner stopped was not heard of.
    assert len(comparison.differences) <= 3, comparison.differences
