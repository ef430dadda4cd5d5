"""The miner's parts, each with fakes for what it talks to."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import bittensor as bt
import numpy as np
import pytest

from common import ply, spz
from neurons.chain import Metagraph, Neuron
from neurons.miner.generation.pool import ServiceUnavailable
from neurons.miner.generation.service import (
    AttemptFailed,
    Generated,
    GenerationFailed,
)
from neurons.miner.records.events import Event, Generation
from neurons.miner.submission import submitter
from neurons.miner.submission.spool import Spool, SpooledResult
from neurons.miner.submission.submitter import Submitter
from neurons.miner.tasks import task_manager
from neurons.miner.tasks.best_of import BestOf
from neurons.miner.tasks.phases import Phases
from neurons.miner.tasks.task_manager import AsyncTaskManager
from neurons.miner.tasks.workers import Worker
from neurons.miner.validators.clock import ValidatorClocks
from neurons.miner.validators.dendrite import DateListener
from neurons.miner.validators.directory import Eligibility, ValidatorDirectory
from neurons.protocol import Feedback, PullTask, SubmitResults, Task, TextTask
from tests.support.signatures import signature_is_valid
from tests.support.waiting import until

KEYPAIR = bt.Keypair.create_from_uri("//miner")
VALIDATORS = [
    Neuron(uid, bt.Keypair.create_from_uri(f"//validator{uid}").ss58_address, "127.0.0.1", 9000 + uid, 1e4, True)
    for uid in (1, 2, 180)
]
PLY = ply.write(ply.Vertices(ply.columns(0), np.ones((3, 17), dtype=np.float32)))


class FakeNetwork:
    """Validators in the place of a Dendrite. `answers[uid]` is what the next pulls get; None is no connection."""

    def __init__(self) -> None:
        self.answers: dict[int, list[PullTask | None]] = {}
        self.pulls: list[int] = []
        self.submissions: list[SubmitResults] = []
        self.submission_statuses: list[int | None] = []  # next answers; None is no connection, then 200 for ever
        self.feedback: Feedback | None = Feedback(task_fidelity_score=0.75, current_miner_reward=0.02)
        self.cooldown = 300
        self.repetitions: list[bool] = []  # which of the next submissions get feedback and nothing else
        self.on_date: DateListener = lambda *_: None

    async def call(self, target_axon: bt.AxonInfo, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
        uid = target_axon.port - 9000
        await asyncio.sleep(0)
        self.on_date(target_axon.hotkey, formatdate(time.time(), usegmt=True), time.time(), time.time())
        if isinstance(synapse, PullTask):
            self.pulls.append(uid)
            queue = self.answers.get(uid, [])
            answer = queue.pop(0) if queue else PullTask(cooldown_until=int(time.time()) + self.cooldown)
            return _with_status(answer or synapse, 200 if answer else None)
        self.submissions.append(synapse)
        status = self.submission_statuses.pop(0) if self.submission_statuses else 200
        if status == 200:
            synapse.feedback = self.feedback if synapse.results else Feedback()
            repetition = self.repetitions.pop(0) if self.repetitions else False
            synapse.cooldown_until = 0 if repetition else int(time.time()) + self.cooldown
            if repetition:
                synapse.feedback = Feedback()
        return _with_status(synapse, status)


def _with_status(synapse: Any, status: int | None) -> Any:
    # As Dendrite leaves it: an error on the way has a code for the dendrite and none for the axon.
    synapse.axon = bt.TerminalInfo(status_code=status)
    synapse.dendrite = bt.TerminalInfo(status_code=status or 503, status_message="said so")
    return synapse


class FakeGenerator:
    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.seeds: list[int] = []
        self.ready = asyncio.Event()
        self.ready.set()
        self.seconds_per_task: float | None = None
        self.result: Generated | Exception = Generated(PLY, 0.76, "1", "")

    def expected_seconds(self, tasks: int) -> float | None:
        return self.seconds_per_task and tasks * self.seconds_per_task

    def seconds_without_wait(self) -> float | None:
        return self.seconds_per_task

    def candidates_within(self, seconds: float, tasks: int) -> int:
        return 0

    async def generate(self, task: Task, seed: int, patience: float, *effort: Any) -> Generated:
        assert 0 < patience <= 300  # seconds, what a task is worth
        self.tasks.append(task)
        self.seeds.append(seed)
        await asyncio.sleep(0)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class Bench:
    """A task manager, a submitter and workers over the fakes."""

    def __init__(self, folder: Path, validators: list[Neuron] = VALIDATORS) -> None:
        self.network = FakeNetwork()
        self.generator = FakeGenerator()
        self.totals: Counter[str] = Counter()
        self.events: list[Event] = []
        self.spool = Spool(folder)
        self.directory = ValidatorDirectory(Eligibility(KEYPAIR.ss58_address, "rehearsal", frozenset({180})))
        self.directory.update(Metagraph(17, tuple(validators)))
        self.clocks = ValidatorClocks()
        self.network.on_date = self.clocks.answered
        self.submitter = Submitter(self.network, self.directory, self.clocks, KEYPAIR, self.spool, self.record)
        self.manager = AsyncTaskManager(
            self.network,
            self.directory,
            self.clocks,
            self.submitter,
            self.generator,
            self.record,
            workers=4,
            threshold=0.6,
            cooldowns={},
            worth_asking_at=lambda _: 0.0,
            phases=Phases(lambda _: 0.0),
        )
        self.retries = 0
        self.workers: list[asyncio.Task[None]] = []

    def record(self, event: Event) -> None:
        self.events.append(event)
        self.totals[f"{type(event).__name__.lower()} {event.outcome}"] += 1

    async def run_until(self, condition: Callable[[], bool]) -> None:
        while len(self.workers) < 4:
            best_of = BestOf(1, self.generator, 4, self.clocks.now)
            worker = Worker(
                self.manager, self.generator, self.submitter, self.record, best_of=best_of, retries=self.retries
            )
            self.workers.append(asyncio.create_task(worker.run()))
        self.manager.sync()
        await until(condition, 10)

    async def stop(self) -> None:
        await self.manager.close()
        await asyncio.gather(*self.workers)
        await self.submitter.drain(5)


@pytest.fixture
async def bench(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Bench]:
    caplog.set_level(logging.INFO)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("neurons"):  # bittensor's import sets the loggers that exist to CRITICAL
            logging.getLogger(name).setLevel(logging.NOTSET)
    bench = Bench(tmp_path)
    yield bench
    await bench.stop()


def task_for(number: int, **fields: Any) -> PullTask:
    return PullTask(task=TextTask(id=f"id-{number}", prompt=f"prompt {number}"), **fields)


# --- from pull to feedback


async def test_pull_generate_submit(bench: Bench, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    bench.network.answers = {1: [task_for(1)], 2: [task_for(2)], 180: [task_for(3)]}
    await bench.run_until(lambda: bench.totals["submission accepted"] == 2)
    assert sorted(bench.network.pulls) == [1, 2]  # once each, and never UID 180
    assert sorted(task.id for task in bench.generator.tasks) == ["id-1", "id-2"]
    by_task = {submission.task_id: submission for submission in bench.network.submissions}
    for task_id, validator in zip(("id-1", "id-2"), VALIDATORS[:2], strict=True):
        submission = by_task[task_id]
        assert submission.task is not None
        assert signature_is_valid(submission, submission.task.prompt, validator.hotkey, KEYPAIR.ss58_address)
    assert os.listdir(tmp_path) == []
    assert bench.manager.first_round_done.is_set()
    lines = [record.getMessage() for record in caplog.records]
    for expected in (
        "Task pulled from validator [1]",
        "Task submitted to validator [2]",
        "Feedback from [1]: Score=0.75, Reward=0.02",
        "CLIP Score: 0.76",
    ):
        assert any(expected in line for line in lines), expected


async def test_the_log_has_the_alignment_and_the_whole_score(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    parts = {"iqa": 0.75, "alignment": 0.81, "ssim": 0.9}
    bench.generator.result = Generated(PLY, 0.76, "1", "", parts=parts)
    bench.network.answers = {1: [task_for(1)]}
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "CLIP Score: 0.81 (validator [1]" in text
    assert "Score: 0.76 (quality 0.75, alignment 0.81, SSIM 0.90)" in text


async def test_validators_are_asked_at_once_and_each_by_its_own_clock(bench: Bench) -> None:
    now = int(time.time())
    bench.network.answers = {
        1: [PullTask(cooldown_until=now + 1), task_for(1)],  # may be asked again in 1 to 2 s
        2: [PullTask(cooldown_until=now + 3000)],
    }
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)
    assert bench.network.pulls[:2] == [1, 2]
    assert bench.network.pulls.count(2) == 1
    assert time.time() > now + 1


async def test_a_task_in_hand_is_not_pulled_again(bench: Bench) -> None:
    bench.network.answers = {1: [task_for(1)] * 3}
    bench.network.cooldown = 3000
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)
    await asyncio.sleep(0.05)
    assert bench.network.pulls.count(1) == 1


async def test_nothing_is_pulled_while_nobody_can_generate(bench: Bench) -> None:
    bench.generator.ready.clear()
    bench.network.answers = {1: [task_for(1)]}
    await bench.run_until(lambda: True)
    await asyncio.sleep(0.05)
    assert bench.network.pulls == []
    assert not bench.manager.first_round_done.is_set()
    bench.generator.ready.set()
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)


async def test_room_for_another_task_brings_no_pull_once_nobody_can_generate(bench: Bench) -> None:
    bench.generator.seconds_per_task = 200.0  # room for one
    bench.network.answers = {1: [task_for(1)], 2: [task_for(2)]}
    bench.manager.sync()
    first = await bench.manager.next_assignment()
    assert first is not None
    bench.generator.ready.clear()
    bench.manager.finished(first)
    await asyncio.sleep(0.05)
    assert len(bench.network.pulls) == 1


async def test_what_waits_for_a_worker_at_a_stop_is_not_begun(bench: Bench) -> None:
    bench.network.answers = {1: [task_for(1)], 2: [task_for(2)]}
    bench.manager.sync()
    await until(lambda: bench.manager.queued == 2, 5)
    await bench.manager.close()
    assert await bench.manager.next_assignment() is None


async def test_pulling_stops_when_the_queue_is_full(tmp_path: Path) -> None:
    validators = [
        Neuron(uid, bt.Keypair.create_from_uri(f"//v{uid}").ss58_address, "127.0.0.1", 9000 + uid, 1e4, True)
        for uid in range(30)
    ]
    bench = Bench(tmp_path, validators)
    bench.network.answers = {uid: [task_for(uid)] for uid in range(30)}
    bench.manager.sync()
    await asyncio.sleep(0.1)
    assert bench.manager.queued == 4  # nothing is measured yet: one for each worker, and nobody works
    before = len(bench.network.pulls)
    await asyncio.sleep(0.05)
    assert len(bench.network.pulls) == before
    await bench.run_until(lambda: bench.totals["submission accepted"] == 30)
    await bench.stop()


@pytest.mark.parametrize(
    ("result", "threshold", "line"),
    [
        (Generated(b"", 0.41, "1", "score 0.41 under 0.60"), 0.6, "Validation failed"),
        (Generated(PLY, 0.70, "1", ""), 0.75, "Validation failed"),  # this validator wants more than we do
        (Generated(PLY, 0.59, "1", ""), 0.3, "Validation failed"),  # and this one less
        (GenerationFailed("500"), 0.6, "Generation failed"),
        (Generated(b"not a PLY", 0.9, "1", ""), 0.6, "Generation failed"),
    ],
)
async def test_what_would_not_be_accepted_goes_out_empty(
    bench: Bench, caplog: pytest.LogCaptureFixture, result: Generated | Exception, threshold: float, line: str
) -> None:
    bench.generator.result = result
    bench.network.answers = {1: [task_for(1, validation_threshold=threshold)]}
    await bench.run_until(lambda: bench.totals["submission empty"] == 1)
    assert [submission.results for submission in bench.network.submissions] == [""]
    assert any(line in record.getMessage() for record in caplog.records)
    assert bench.totals["submission accepted"] == 0


@pytest.mark.parametrize("threshold", [2.0, float("nan"), float("inf"), -5.0])
async def test_thresholds_that_make_no_sense_are_our_own(bench: Bench, threshold: float) -> None:
    bench.network.answers = {1: [task_for(1, validation_threshold=threshold)]}
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)
    assert bench.network.submissions[0].results != ""


async def test_a_task_stays_open_while_the_service_is_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurons.miner.tasks.workers.DEFAULT_PAUSE_S", 0.05)
    bench.generator.result = ServiceUnavailable("gone")
    bench.network.answers = {1: [task_for(1), task_for(1)]}
    await bench.run_until(lambda: bench.totals["generation endpoint"] == 1)
    bench.generator.result = Generated(PLY, 0.76, "1", "")
    await until(lambda: bench.totals["submission accepted"], 5)
    assert len(bench.network.submissions) == 1


async def test_a_task_that_would_be_tried_again_stays_open_at_a_stop(bench: Bench) -> None:
    bench.retries = 2
    began, go_on = asyncio.Event(), asyncio.Event()

    async def generate(task: Task, seed: int, patience: float, *effort: Any) -> Generated:
        began.set()
        await go_on.wait()
        return Generated(b"", 0.41, "1", "score 0.41 under 0.60")

    bench.generator.generate = generate  # type: ignore[method-assign]
    bench.network.answers = {1: [task_for(1)]}
    await bench.run_until(began.is_set)
    closing = asyncio.create_task(bench.manager.close())
    await asyncio.sleep(0.01)
    go_on.set()
    await closing
    await asyncio.gather(*bench.workers)
    assert bench.totals["generation rejected"] == 1
    assert bench.network.submissions == []  # an empty result would end the task


async def test_only_the_time_at_a_service_counts(bench: Bench) -> None:
    bench.retries = 1
    bench.generator.result = AttemptFailed("500", "http://a", 3.5)
    bench.network.answers = {1: [task_for(1)]}
    await bench.run_until(lambda: bench.totals["submission empty"] == 1)
    generations = [event for event in bench.events if isinstance(event, Generation)]
    assert [(each.seconds, each.endpoint) for each in generations] == [(3.5, "http://a")] * 2


# --- submission and spool


async def test_submissions_are_repeated_until_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(submitter, "FIRST_RETRY_S", 0.01)
    bench.network.submission_statuses = [None, 500]
    bench.network.answers = {1: [task_for(1)]}
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)
    assert len(bench.network.submissions) == 3
    assert len({submission.signature for submission in bench.network.submissions}) == 3
    assert os.listdir(tmp_path) == []


async def test_a_refusal_is_final(bench: Bench, tmp_path: Path) -> None:
    bench.network.submission_statuses = [403]
    bench.network.answers = {1: [task_for(1)]}
    await bench.run_until(lambda: bench.totals["submission refused"] == 1)
    assert len(bench.network.submissions) == 1
    assert os.listdir(tmp_path) == []


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitter, "LOCK_S", 0.01)
    monkeypatch.setattr(submitter, "SOON_S", 0.01)


async def test_a_result_that_got_feedback_alone_is_not_made_again(bench: Bench, tmp_path: Path) -> None:
    bench.network.answers = {1: [task_for(1), task_for(1)]}
    bench.network.repetitions = [True]
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)
    assert [submission.task_id for submission in bench.network.submissions] == ["id-1", "id-1"]
    assert len(bench.generator.tasks) == 1
    assert sum(name.startswith("submission") for name in bench.totals) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("answer", [task_for(2), PullTask(cooldown_until=2**33, cooldown_violations=1)])
async def test_a_result_that_got_feedback_alone_is_forgotten_when_it_is_not_asked_for(
    bench: Bench, tmp_path: Path, answer: PullTask
) -> None:
    bench.network.answers = {1: [task_for(1), answer]}
    bench.network.repetitions = [True]
    await bench.run_until(lambda: bench.network.pulls.count(1) >= 2 and os.listdir(tmp_path) == [])
    assert [task.id for task in bench.generator.tasks].count("id-1") == 1
    assert bench.spool.get(VALIDATORS[0].hotkey, TextTask(id="id-1", prompt="prompt 1")) is None


async def test_an_earlier_run_s_result_is_handed_in_when_its_validator_asks_for_it(tmp_path: Path) -> None:
    task = TextTask(id="old", prompt="p")
    Spool(tmp_path).put(SpooledResult(VALIDATORS[0].hotkey, task, b"spz"))
    bench = Bench(tmp_path)
    bench.generator.ready.clear()  # nobody needs to wait for a service
    bench.network.answers = {1: [PullTask(task=task)]}
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)
    assert [submission.task_id for submission in bench.network.submissions] == ["old"]
    assert bench.network.pulls == [1]  # and for another task it waits for its cooldown
    assert bench.generator.tasks == []
    assert os.listdir(tmp_path) == []
    bench.generator.ready.set()
    await bench.stop()


async def test_what_is_not_answered_at_stop_stays_in_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitter, "FIRST_RETRY_S", 60.0)
    bench = Bench(tmp_path)
    bench.network.submission_statuses = [None] * 5
    bench.network.answers = {1: [task_for(1)]}
    await bench.run_until(lambda: len(bench.network.submissions) == 1)
    await bench.manager.close()
    await asyncio.gather(*bench.workers)
    await bench.submitter.drain(0.05)
    task = TextTask(id="id-1", prompt="prompt 1")
    assert Spool(tmp_path).entries() == [(VALIDATORS[0].hotkey, task.id)]
    entry = Spool(tmp_path).get(VALIDATORS[0].hotkey, task)
    assert entry is not None
    assert spz.decompress(entry.result)


async def test_a_full_disk_does_not_lose_the_submission(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(entry: SpooledResult) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.spool, "put", full)
    bench.network.answers = {1: [task_for(1)]}
    await bench.run_until(lambda: bench.totals["submission accepted"] == 1)


async def test_a_silent_validator_is_asked_less_and_less(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_manager, "FIRST_RETRY_S", 0.02)
    bench.network.answers = {1: [None] * 50, 2: [task_for(2)]}
    await bench.run_until(lambda: bench.network.pulls.count(1) == 4)
    assert bench.totals["submission accepted"] == 1  # the other one is served meanwhile
