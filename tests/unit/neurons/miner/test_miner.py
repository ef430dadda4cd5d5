"""The miner's parts, each with fakes for what it talks to."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import aiohttp
import bittensor as bt
import numpy as np
import pytest
from aiohttp import web

from common import ply, spz
from common.log_lines import SingleLineFormatter, quoted
from neurons.chain import Metagraph, Neuron
from neurons.miner import options
from neurons.miner.assignment import USEFUL_AGE_S
from neurons.miner.generation import pool as generators
from neurons.miner.generation import service as service_module
from neurons.miner.generation.pool import GeneratorPool, ServiceUnavailable
from neurons.miner.generation.service import (
    AttemptFailed,
    EndpointUnavailable,
    Generated,
    GenerationFailed,
    GenerationService,
)
from neurons.miner.records.events import Event, Generation
from neurons.miner.submission import submitter
from neurons.miner.submission.spool import MAX_AGE_S, Spool, SpooledResult
from neurons.miner.submission.submitter import Submitter
from neurons.miner.tasks import task_manager
from neurons.miner.tasks.best_of import BestOf
from neurons.miner.tasks.task_manager import AsyncTaskManager
from neurons.miner.tasks.workers import Worker
from neurons.miner.validators.clock import ValidatorClocks
from neurons.miner.validators.dendrite import DateListener
from neurons.miner.validators.directory import Eligibility, ValidatorDirectory
from neurons.protocol import Feedback, ImageTask, PullTask, SubmitResults, Task, TextTask, signature_is_valid
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

    def shortest_seconds(self) -> float | None:
        return self.seconds_per_task

    def candidates_within(self, seconds: float, tasks: int) -> int:
        return 0

    async def generate(self, task: Task, seed: int, patience: float, *effort: Any) -> Generated:
        assert 0 < patience <= USEFUL_AGE_S
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
    assert "Score: 0.76 (iqa 0.75, alignment 0.81, ssim 0.90)" in text


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
    await bench.run_until(lambda: bench.network.pulls.count(1) >= 2)
    await asyncio.sleep(0.1)
    assert [task.id for task in bench.generator.tasks].count("id-1") == 1
    assert bench.spool.get(VALIDATORS[0].hotkey, TextTask(id="id-1", prompt="prompt 1")) is None
    assert os.listdir(tmp_path) == []


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
    assert Spool(tmp_path).entries() == {VALIDATORS[0].hotkey: [task]}
    entry = Spool(tmp_path).get(VALIDATORS[0].hotkey, task)
    assert entry is not None
    assert spz.decompress(entry.result)


def test_spool_round_trip_and_hostile_ids(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for task in (TextTask(id="../../etc/passwd\0", prompt="p\nq"), ImageTask(id="x" * 1000, prompt="aGk=")):
        entry = SpooledResult("5V", task, b"\n\0binary\n")
        spool.put(entry)
        assert spool.get("5V", task) == entry
        assert spool.get("5W", task) is None
        assert spool.get("5V", TextTask(id=task.id, prompt="another")) is None
    assert len(list(tmp_path.rglob("*"))) == 3  # the folder and two files in it
    assert sum(map(len, spool.entries().values())) == 2
    spool.remove("5V", "x" * 1000)
    spool.remove("5V", "x" * 1000)
    assert sum(map(len, spool.entries().values())) == 1


def test_damaged_and_old_entries_are_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in (1, 2):
        spool.put(SpooledResult("5V", TextTask(id=str(number), prompt="p"), b""))
    old, damaged = sorted(tmp_path.iterdir())
    os.utime(old, (time.time() - MAX_AGE_S - 5,) * 2)
    damaged.write_bytes(b"{}\nx")
    (tmp_path / "half.tmp").write_bytes(b"")
    assert spool.entries() == {}
    assert os.listdir(tmp_path) == []


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


# --- the generation service's client


Handler = Callable[[web.Request], Awaitable[web.Response]]


async def serve(handler: Handler) -> tuple[web.AppRunner, str]:
    app = web.Application(client_max_size=1 << 25)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def ask_service(handler: Handler, task: Task) -> Generated:
    runner, url = await serve(handler)
    try:
        async with GenerationService(url) as service:
            generated = await service.generate(task, 5)
            assert generated.endpoint == url
            assert 0 < generated.seconds < 5
            return replace(generated, endpoint="", seconds=0.0)
    finally:
        await runner.cleanup()


async def test_a_generated_splat_comes_with_its_score() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.path == "/generate/"
        assert request.headers["X-Priority"] == "background"  # who asks in person goes first
        form = await request.post()
        assert form["prompt"] == "größer"
        assert form["seed"] == "5"
        assert len(form) == 2
        return web.Response(body=PLY, headers={"X-Score": "0.76", "X-Seed": "5"})

    assert await ask_service(handler, TextTask(id="1", prompt="größer")) == Generated(PLY, 0.76, "5", "")


@pytest.mark.parametrize(
    ("header", "scores"),
    [
        ("[[5, 0.7], [9, null], [3, 0.76]]", (0.7, None, 0.76)),
        ("[[5, 0.7], [9, NaN], [3, 0.76], [4, 0.9]]", (0.7, None, 0.76)),  # no more than were asked for
        ("[5, 0.7]", ()),
        ("{", ()),
        ("[" * 4000, ()),
    ],
)
async def test_several_candidates_are_asked_for_and_their_scores_are_read(header: str, scores: Any) -> None:
    async def handler(request: web.Request) -> web.Response:
        form = await request.post()
        assert (form["seed"], form["candidates"], form["budget_seconds"]) == ("5", "3", "4.500")
        return web.Response(body=PLY, headers={"X-Score": "0.76", "X-Seed": "3", "X-Scores": header})

    runner, url = await serve(handler)
    try:
        async with GenerationService(url) as service:
            generated = await service.generate(TextTask(id="1", prompt="p"), 5, 3, 4.5)
    finally:
        await runner.cleanup()
    assert generated.scores == scores
    assert generated.candidates == max(len(scores), 1)
    assert generated.first_score == (scores[0] if scores else 0.76)


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ('{"alignment": 0.81, "iqa": 0.75, "ssim": 0.9, "lpips": null}', {"iqa": 0.75, "alignment": 0.81, "ssim": 0.9}),
        ('{"alignment": NaN, "iqa": [1], "more": 1, "ssim": true, "lpips": "x"}', {}),
        ("[1]", {}),
        ("{", {}),
        ("[" * 4000, {}),
    ],
)
async def test_a_score_comes_with_its_parts(header: str, parts: dict[str, float]) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=PLY, headers={"X-Score": "0.76", "X-Seed": "5", "X-Score-Parts": header})

    assert await ask_service(handler, TextTask(id="1", prompt="p")) == Generated(PLY, 0.76, "5", "", parts=parts)


async def test_a_service_that_refuses_its_name_says_so() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=421, text="the flag --allowed-hosts adds it")

    runner, url = await serve(handler)
    async with GenerationService(url) as service:
        with pytest.raises(EndpointUnavailable, match=r"refuses to answer \(421\): .*--allowed-hosts"):
            await service.health()
    await runner.cleanup()


async def test_line_breaks_are_no_reason_to_lose_a_task() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert (await request.post())["prompt"] == "a red cube, on a table"
        return web.Response(body=PLY)

    assert (await ask_service(handler, TextTask(id="1", prompt=" a red\r\ncube,\ton a  table\n"))).ply == PLY


@pytest.mark.parametrize("call", ["health", "generate"])
async def test_an_endpoint_that_takes_no_connection_is_not_there(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is gone without a word: packets are dropped, nothing is refused."""

    async def nobody(*_: object, **__: object) -> object:
        raise aiohttp.ConnectionTimeoutError("Connection timeout to host")

    monkeypatch.setattr(aiohttp.ClientSession, "_request", nobody)
    async with GenerationService("http://10.0.0.1:9") as service:
        with pytest.raises(EndpointUnavailable, match="no connection in time"):
            await (service.health() if call == "health" else service.generate(TextTask(id="1", prompt="p"), 1))


async def test_a_service_that_takes_connections_and_never_answers_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not unreachable: the kernel answers for a process that is frozen."""
    monkeypatch.setattr(service_module, "HEALTH_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with GenerationService(f"http://127.0.0.1:{server.getsockname()[1]}") as service:
            assert await service.health() is None


async def test_a_failed_attempt_says_where_and_for_how_long() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=500)

    with pytest.raises(AttemptFailed) as failed:
        await ask_service(handler, TextTask(id="1", prompt="p"))
    assert failed.value.endpoint.startswith("http://127.0.0.1:")
    assert 0 < failed.value.seconds < 5


async def test_an_image_task_is_uploaded() -> None:
    async def handler(request: web.Request) -> web.Response:
        upload = (await request.post())["prompt_image_file"]
        assert isinstance(upload, web.FileField)
        assert upload.file.read() == b"hi"
        return web.Response(body=b"", headers={"X-Score": "nan", "X-Rejected": "gates"})

    assert await ask_service(handler, ImageTask(id="1", prompt="aGk=")) == Generated(b"", None, "?", "gates")


async def test_a_picture_in_which_nothing_was_found_is_given_up() -> None:
    """How an object is looked for does not depend on the seed: another one would end the same way."""

    async def nothing(request: web.Request) -> web.Response:
        return web.Response(body=b"", headers={"X-Hopeless": "1", "X-Rejected": "no object in the image"})

    with pytest.raises(GenerationFailed, match="no object in the image"):
        await ask_service(nothing, ImageTask(id="1", prompt="aGk="))


async def test_a_picture_of_which_one_seed_makes_nothing_is_tried_again() -> None:
    async def too_many(request: web.Request) -> web.Response:
        return web.Response(body=b"", headers={"X-Num-Gaussians": "0", "X-Rejected": "structure: too many voxels"})

    generated = await ask_service(too_many, ImageTask(id="1", prompt="aGk="))
    assert (generated.ply, generated.rejected) == (b"", "structure: too many voxels")


async def test_base64_in_lines_is_a_picture() -> None:
    async def handler(request: web.Request) -> web.Response:
        upload = (await request.post())["prompt_image_file"]
        assert isinstance(upload, web.FileField)
        assert upload.file.read() == b"hi there"
        return web.Response(body=PLY)

    assert (await ask_service(handler, ImageTask(id="1", prompt="aGkg\r\ndGhlcmU=\n"))).ply == PLY


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_service_says_for_how_long(status: int) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Retry-After": "7"})

    with pytest.raises(EndpointUnavailable) as busy:
        await ask_service(handler, TextTask(id="1", prompt="p"))
    assert busy.value.seconds == 7


async def test_a_service_that_is_gone() -> None:
    async with GenerationService("http://127.0.0.1:9") as service:
        with pytest.raises(EndpointUnavailable):
            await service.generate(TextTask(id="1", prompt="p"), 1)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (GenerationFailed, 400),
        (GenerationFailed, 413),
        (GenerationFailed, 422),
        (AttemptFailed, 500),
        (AttemptFailed, 504),
        (AttemptFailed, 408),
        (EndpointUnavailable, 401),  # of a proxy or a gateway: the task can go elsewhere
        (EndpointUnavailable, 404),
    ],
)
async def test_other_answers_end_the_task_or_the_attempt(failure: type[Exception], status: int) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, text="\x1b[31mbad\nline")

    with pytest.raises(failure, match=rf"{status}: '\\x1b\[31mbad\\nline'"):
        await ask_service(handler, TextTask(id="1", prompt="p"))


@pytest.mark.parametrize(
    "task",
    [
        TextTask(id="1", prompt=""),
        TextTask(id="1", prompt="x" * 1025),
        TextTask(id="1", prompt="a\x1b[2Jb"),
        TextTask(id="1", prompt=" \n\t"),
        TextTask(id="1", prompt="\x9b"),
        ImageTask(id="1", prompt="no base64!"),
    ],
)
async def test_prompts_that_are_not_fit_never_reach_the_service(task: Task) -> None:
    async with GenerationService("http://127.0.0.1:9") as service:
        with pytest.raises(GenerationFailed):
            await service.generate(task, 1)


async def test_a_password_in_an_address_is_used_and_never_shown() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        return web.json_response({"status": "ready"})

    runner, url = await serve(handler)
    async with GenerationService(url.replace("://", "://miner:secret@")) as service:
        assert await service.health() == "ready"
        assert service.endpoint == url
    await runner.cleanup()
    assert seen == [aiohttp.encode_basic_auth("miner", "secret")]


async def test_health_opens_and_closes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "HEALTH_INTERVAL_S", 0.01)
    status = "loading"
    asked = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"status": status})

    runner, url = await serve(handler)
    async with GenerationService(url) as service, asyncio.timeout(5):
        pool = GeneratorPool([service])
        watching = asyncio.create_task(pool.watch())
        await until(lambda: asked >= 3)
        assert not pool.ready.is_set()
        status = "ready"
        await pool.ready.wait()
        await runner.cleanup()
        await until(lambda: not pool.ready.is_set())
        watching.cancel()


# --- command line and log


def test_networks_and_wallets() -> None:
    rehearsal = options.parse([])
    assert (rehearsal.network, rehearsal.wallet_name, rehearsal.wallet_hotkey) == ("rehearsal", "rehearsal", "miner")
    assert rehearsal.wallet_path == Path("data/rehearsal/wallets")
    real = options.parse(["--wallet.name", "w", "--wallet.hotkey", "h", "--wallet.path", "/k"])
    assert (real.network, real.wallet_name, real.wallet_hotkey, str(real.wallet_path)) == ("finney", "w", "h", "/k")
    assert (real.blacklist, real.netuid, real.workers) == ((180,), 17, 4)
    practice = options.parse(["--wallet.name", "w", "--network", "rehearsal"])
    assert practice.wallet_name == "rehearsal"  # the real one stays out of it
    assert options.parse(["--subtensor.network", "ws://127.0.0.1:9944"]).network == "ws://127.0.0.1:9944"
    hotkey = KEYPAIR.ss58_address
    assert options.parse(["--blacklist", "180", "7", hotkey]).blacklist == (180, 7, hotkey)
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert options.parse(["--generation.endpoint", *urls]).endpoints == tuple(urls)
    repeated = [word for url in (*urls, urls[0]) for word in ("--generation.endpoint", url)]
    assert options.parse(repeated).endpoints == tuple(urls)
    assert options.parse([]).endpoints == ("http://127.0.0.1:10006",)


@pytest.mark.parametrize(
    "argv",
    [
        ["--network", "mainnet"],
        ["--workers", "0"],
        ["--validation-threshold", "1.5"],
        ["--validation-threshold", "nan"],
        ["--blacklist", "x"],
        ["--retries", "-1"],
        ["--generation.endpoint", "file:///etc/passwd"],
        ["--generation.endpoint", "http://10.0.0.2:1000g"],
        ["--generation.endpoint", "http://:10006"],
        ["--generation.endpoint", "http://[10006"],
        ["--work", "4"],
    ],
)
def test_bad_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        options.parse(argv)
    assert stop.value.code == 2


def test_a_stranger_s_text_can_not_forge_a_line() -> None:
    assert quoted("a\nb\x1b[2J\u2028") == "'a\\nb\\x1b[2J\\u2028'"
    assert len(quoted("\x00" * 10**6)) < 160
    formatter = SingleLineFormatter("%(levelname)s %(message)s")
    record = logging.LogRecord("x", logging.INFO, "", 0, "said: %s", ("a\r\nINFO forged \x1b[2J\x9b\u2028",), None)
    assert formatter.format(record) == "INFO said: a\\r\\nINFO forged \\x1b[2J\\x9b\\u2028"
    try:
        raise ValueError("a\nINFO forged")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert not any(line.startswith("INFO forged") for line in formatter.format(record).split("\n"))
