"""What the miner makes of a validator's answers, scripted field by field as the public validator gives them.

Nothing in here asks the rehearsal's rules. An answer to a submission is its status, `validation_failed`,
`task_fidelity_score`, the seconds that `cooldown_until` lies ahead, and how many results the validator counts.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurons.chain import Metagraph, Neuron
from neurons.miner.assemble import assemble
from neurons.miner.records.bookkeeping import Bookkeeping
from neurons.miner.records.events import Event, Settlement, Submission, SubmissionOutcome
from neurons.miner.records.verdicts import WINDOW_S, PastSubmission, Span, Window
from neurons.miner.submission.spool import MAX_AGE_S, Spool, SpooledResult
from neurons.miner.submission.submitter import Submitter
from neurons.miner.validators.blacklist import Blacklist
from neurons.miner.validators.clock import ValidatorClocks
from neurons.miner.validators.dendrite import CONNECTION_LOST, NO_CONNECTION
from neurons.miner.validators.directory import Eligibility, ValidatorDirectory
from neurons.protocol import Feedback, PullTask, SubmitResults, TextTask, signature_is_valid
from scripts.bench import virtual_time
from scripts.bench.simulated_subnet import MemoryBooks, StandInService, options_in
from scripts.bench.virtual_time import now

KEYPAIR = bt.Keypair.create_from_uri("//miner")
VALIDATOR = Neuron(7, bt.Keypair.create_from_uri("//validator").ss58_address, "127.0.0.1", 9000, 1e4, True)
GENERATION_S = 10.0
CLOCK_AHEAD_S = 120.0  # of the validator's


@dataclass(frozen=True)
class Answer:
    """To a submission. `ahead`: None repeats the old `cooldown_until`. `arrived`: None where none was needed."""

    status: int | None = 200
    validation_failed: bool = False
    score: float = 0.0
    ahead: float | None = None
    count: int = 0
    seconds: float = 1.0


# The table of what the feedback of each outcome says.
ACCEPTED = Answer(score=0.8, ahead=285, count=1)
DECLINED = Answer(ahead=885)  # under the threshold, a bad signature, an exception inside scoring: they look the same
BROKEN = Answer(validation_failed=True, ahead=285)
EMPTY = Answer(ahead=285)
REPETITION = Answer()  # the lock, or a wrong id
SECOND_AFTER_ACCEPTED = Answer(ahead=280, count=1)  # of two that overlapped
LOST = Answer(status=None)
NOT_ASSIGNED = Answer(status=403)


class Scripted:
    """A validator in the place of a dendrite that says what it is told to.

    `pulls`: a task's name, seconds of a cooldown, a whole answer, or None for no connection; then it is on cooldown.
    """

    def __init__(self, pulls: Sequence[str | float | PullTask | None], answers: Sequence[Answer]) -> None:
        self.pulls, self.answers = deque(pulls), deque(answers)
        self.pulled_at: list[float] = []
        self.submissions: list[tuple[float, SubmitResults]] = []
        self.on_date: Callable[..., None] = lambda *_: None
        self.seconds_ahead: Callable[[str], float] = lambda _: 0.0
        self.old_cooldown = 0

    def clock(self) -> float:
        return now() + CLOCK_AHEAD_S

    async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
        sent, status = now(), 200
        await asyncio.sleep(0.1)
        if isinstance(synapse, PullTask):
            self.pulled_at.append(sent)
            said = self.pulls.popleft() if self.pulls else 7200.0
            if isinstance(said, str):
                synapse.task = TextTask(id=said, prompt=f"prompt of {said}")
            elif isinstance(said, float | int):
                synapse.cooldown_until, synapse.cooldown_violations = int(self.clock() + said), 1
            elif said is None:
                return _answered(synapse, None, NO_CONNECTION)
            else:
                synapse.cooldown_until = said.cooldown_until
        else:
            self.submissions.append((sent, synapse))
            answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
            await asyncio.sleep(answer.seconds)
            if answer.status is None:
                return _answered(synapse, None, CONNECTION_LOST)
            status = answer.status
            if status == 200:
                if answer.ahead is not None:
                    self.old_cooldown = int(self.clock() + answer.ahead)
                synapse.cooldown_until = self.old_cooldown
                synapse.feedback = Feedback(
                    validation_failed=answer.validation_failed,
                    task_fidelity_score=answer.score,
                    average_fidelity_score=1.0,
                    generations_within_the_window=answer.count,
                )
        self.on_date(target_axon.hotkey, formatdate(self.clock(), usegmt=True), sent, now())
        return _answered(synapse, status, status)


def _answered(synapse: Any, axon: int | None, dendrite: int) -> Any:
    synapse.axon, synapse.dendrite = bt.TerminalInfo(status_code=axon), bt.TerminalInfo(status_code=dendrite)
    return synapse


class Service(StandInService):
    rejects = False

    async def generate(self, task: Any, seed: int, *effort: Any) -> Any:
        generated = await super().generate(task, seed, *effort)
        return replace(generated, ply=b"", rejected="score 0.2") if self.rejects else generated


async def metagraph() -> Metagraph:
    return Metagraph(17, (VALIDATOR,))


class Miner:
    """The assembled parts, over one validator and one service."""

    def __init__(self, validator: Scripted, folder: Path, history: Sequence[PastSubmission] = ()) -> None:
        self.validator = validator
        self.books = MemoryBooks(past=history)
        self.events = self.books.events
        self.service = Service(GENERATION_S, 4)
        self._options = replace(options_in(folder), spool=folder, retries=0)

    async def run(self, seconds: float) -> None:
        miner = await assemble(
            *(self._options, KEYPAIR),
            dendrite=self.validator,
            services=[self.service],
            fetch=metagraph,
            blacklist=Blacklist(()),
            books=self.books,
            now=now,
        )
        miner.directory.update(await metagraph())
        miner.manager.sync()
        parts = [asyncio.create_task(part) for part in (miner.pool.watch(), *(each.run() for each in miner.workers))]
        await asyncio.sleep(seconds)
        await miner.manager.close()
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
        await miner.submitter.drain(0.0)

    @property
    def submissions(self) -> list[tuple[str, str]]:
        return [(event.task_id, event.outcome) for event in self.events if isinstance(event, Submission)]

    @property
    def settlements(self) -> list[tuple[str, str]]:
        return [(event.task_id, event.outcome) for event in self.events if isinstance(event, Settlement)]


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("neurons"):
            logging.getLogger(name).setLevel(logging.NOTSET)


def declined_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if "did not accept" in line]


def mine(
    folder: Path,
    pulls: Sequence[str | float | PullTask | None],
    answers: Sequence[Answer],
    seconds: float = 600.0,
    rejects: bool = False,
) -> Miner:
    async def main() -> Miner:
        miner = Miner(Scripted(pulls, answers), folder)
        miner.service.rejects = rejects
        await miner.run(seconds)
        return miner

    return virtual_time.run(main())


# --- one answer


@pytest.mark.parametrize("tasks_before", [0, 1])  # the old cooldown_until is 0 only before the first task's end
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(ACCEPTED, "accepted"), (DECLINED, "declined"), (BROKEN, "broken"), (EMPTY, "empty")],
    ids=["accepted", "declined", "broken", "empty"],
)
def test_each_answer_is_taken_for_what_it_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: Answer, outcome: str, tasks_before: int
) -> None:
    pulls = [f"task {number}" for number in range(tasks_before + 1)]
    answers = [*[BROKEN] * tasks_before, answer]
    if outcome == "empty":
        miner = mine(tmp_path, pulls[-1:], [EMPTY], 400, rejects=True)
    else:
        miner = mine(tmp_path, pulls, answers, 400 + 300 * tasks_before)
    assert miner.submissions == [*[("task 0", "broken")] * (len(miner.submissions) - 1), (pulls[-1], outcome)]
    assert len(declined_lines(caplog)) == (outcome == "declined")
    assert all(line.startswith("Validation failed: validator [7] did not accept") for line in declined_lines(caplog))
    assert os.listdir(tmp_path) == []
    # And it comes back when that cooldown is over, by the validator's own clock.
    wait = [int(at) for at in miner.validator.pulled_at][len(pulls) :]
    assert wait == [] or wait[0] >= miner.validator.old_cooldown - CLOCK_AHEAD_S - 1


def test_a_validator_that_declines_everything_is_not_one_that_accepts(tmp_path: Path) -> None:
    miner = mine(tmp_path, ["a", "b", "c", "d"], [DECLINED], 3600)
    assert Counter(outcome for _, outcome in miner.submissions) == {"declined": 4}


# --- repetitions


@pytest.mark.parametrize("tasks_before", [0, 1])
def test_a_repetition_keeps_the_result_and_hands_it_in_after_the_lock(tmp_path: Path, tasks_before: int) -> None:
    pulls = [*["before"] * tasks_before, "task", "task"]
    miner = mine(tmp_path, pulls, [*[ACCEPTED] * tasks_before, REPETITION, ACCEPTED], 360 + 300 * tasks_before)
    assert miner.submissions[tasks_before:] == [("task", "accepted")]
    assert miner.service.generated == 1 + tasks_before
    (first, one), (second, other) = miner.validator.submissions[-2:]
    assert 30 <= second - first < 33
    assert one.task_id == other.task_id == "task"
    assert one.results == other.results != ""
    assert one.submit_time < other.submit_time
    assert one.signature != other.signature
    for each in (one, other):
        assert signature_is_valid(each, "prompt of task", VALIDATOR.hotkey, KEYPAIR.ss58_address)
    assert os.listdir(tmp_path) == []


def test_a_repetition_keeps_the_result_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Spool, entry: SpooledResult) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "put", full)
    miner = mine(tmp_path, ["task", "task"], [REPETITION, ACCEPTED], 100)
    assert miner.submissions == [("task", "accepted")]
    assert miner.service.generated == 1


@pytest.mark.parametrize(
    ("pull", "count", "settled"),
    [
        ("another", 2, "accepted"),
        ("another", 1, "unknown"),  # forgotten in a crash, or anything else: nobody tells
        (240.0, 2, "accepted"),
        (240.0, 1, "broken"),
    ],
)
def test_what_the_next_pull_does_not_name_is_dropped_and_settled_by_the_next_count(
    tmp_path: Path, pull: str | float, count: int, settled: str
) -> None:
    pulls = ["task", pull, *(["another"] if pull != "another" else [])]
    miner = mine(tmp_path, pulls, [REPETITION, replace(ACCEPTED, count=count)], 420)
    assert miner.submissions == [("task", "unknown"), ("another", "accepted")]
    assert miner.settlements == [("task", settled)]
    assert miner.service.generated == 2
    assert os.listdir(tmp_path) == []


def test_what_comes_back_after_it_was_answered_is_made_again(tmp_path: Path) -> None:
    miner = mine(tmp_path, ["task", "task"], [ACCEPTED, replace(ACCEPTED, count=2)], 700)
    assert miner.submissions == [("task", "accepted")] * 2
    assert miner.service.generated == 2


# --- lost answers


@pytest.mark.parametrize(
    ("second", "cooldown", "third", "known"),
    [
        # Accepted, and a 403 to the repetition: its cooldown and the next count tell.
        (NOT_ASSIGNED, 275.0, replace(ACCEPTED, count=2), ["unknown", "accepted"]),
        (NOT_ASSIGNED, 275.0, replace(DECLINED, count=1), ["unknown", "accepted"]),
        # Not counted.
        (NOT_ASSIGNED, 275.0, replace(ACCEPTED, count=1), ["unknown", "broken"]),
        (NOT_ASSIGNED, 275.0, BROKEN, ["unknown", "broken"]),
        (NOT_ASSIGNED, 875.0, ACCEPTED, ["declined"]),
        # The repetition overlapped with the first and was scored as well.
        (SECOND_AFTER_ACCEPTED, None, ACCEPTED, ["accepted"]),
        (replace(BROKEN, count=1), None, ACCEPTED, ["accepted"]),  # the first was accepted, the second not scored
        # Neither was counted, and the cooldown is too short for a declined one.
        (replace(SECOND_AFTER_ACCEPTED, count=0), None, ACCEPTED, ["unknown", "broken"]),
        # Or the first never arrived: while it may be under way still, the next count has the last word.
        (replace(BROKEN, ahead=300), None, ACCEPTED, ["unknown", "broken"]),
        (replace(DECLINED, ahead=900), None, ACCEPTED, ["unknown", "declined"]),
        (replace(BROKEN, ahead=300), None, replace(ACCEPTED, count=2), ["unknown", "accepted"]),
        (replace(DECLINED, ahead=900), None, replace(ACCEPTED, count=2), ["unknown", "accepted"]),
        (replace(ACCEPTED, ahead=300), None, ACCEPTED, ["accepted"]),
    ],
)
def test_a_lost_answer_is_made_good_for(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    second: Answer,
    cooldown: float | None,
    third: Answer,
    known: list[str],
) -> None:
    pulls: list[str | float] = ["task", *([] if cooldown is None else [cooldown]), "another"]
    miner = mine(tmp_path, pulls, [LOST, second, third], 1300)
    outcomes = [outcome for name, outcome in miner.submissions + miner.settlements if name == "task"]
    assert outcomes == known
    assert miner.service.generated == 2
    assert len(declined_lines(caplog)) == (known[-1] == "declined") + (third.ahead == DECLINED.ahead)
    if cooldown is not None:
        # One early pull tells, and soon.
        assert miner.validator.pulled_at[1] - miner.validator.submissions[1][0] < 10


def test_old_results_that_leave_the_window_hide_no_accepted_one(tmp_path: Path) -> None:
    """49 tasks in 4 hours: when the answer to the last one is lost, the first has left, and the count is as before."""
    tasks = [f"task {number}" for number in range(49)]
    answers = [replace(ACCEPTED, ahead=290, count=number + 1) for number in range(48)]
    miner = mine(tmp_path, [*tasks, 270.0, "last"], [*answers, LOST, NOT_ASSIGNED, replace(ACCEPTED, count=48)], 15100)
    assert miner.submissions[48:] == [("task 48", "unknown"), ("last", "accepted")]
    assert miner.settlements == [("task 48", "accepted")]


def test_a_repetition_soon_after_a_lost_answer_meets_the_lock(tmp_path: Path) -> None:
    """One later than 30 s after the first would be scored beside it: then a pull comes first."""
    miner = mine(tmp_path, ["task", "task", "task"], [LOST, LOST, LOST, LOST, LOST, REPETITION, ACCEPTED], 400)
    first = miner.validator.submissions[0][0]
    for before, (at, _) in zip(miner.validator.submissions, miner.validator.submissions[1:], strict=False):
        pulls_between = [each for each in miner.validator.pulled_at if before[0] < each < at]
        assert at - first < 30 or pulls_between, at - first
        if pulls_between:
            first = at
    assert miner.submissions == [("task", "accepted")]
    assert miner.service.generated == 1


def test_a_scoring_service_that_hangs_is_heard_of(tmp_path: Path) -> None:
    """The validator gives it 300 s, and answers then."""
    miner = mine(tmp_path, ["task"], [replace(BROKEN, seconds=301.0)], 400)
    assert miner.submissions == [("task", "broken")]
    assert len(miner.validator.submissions) == 1


# --- no use for it


def test_a_403_without_a_lost_answer_brings_a_pull_soon(tmp_path: Path) -> None:
    miner = mine(tmp_path, ["task", "another"], [NOT_ASSIGNED, ACCEPTED], 60)
    assert miner.submissions == [("task", "refused"), ("another", "accepted")]
    assert miner.validator.pulled_at[1] - miner.validator.submissions[0][0] < 10
    assert miner.settlements == []


@pytest.mark.parametrize(
    "answer", [NOT_ASSIGNED, REPETITION, LOST, Answer(status=500)], ids=["403", "repetition", "lost", "500"]
)
def test_a_validator_that_tells_nothing_of_any_result_gets_fewer_and_fewer(tmp_path: Path, answer: Answer) -> None:
    miner = mine(tmp_path, [f"task {number}" for number in range(1000)], [answer], 3600)
    assert 8 <= miner.service.generated <= 22


def test_a_403_for_a_task_that_is_still_assigned_makes_nothing_twice(tmp_path: Path) -> None:
    miner = mine(tmp_path, ["task", "task"], [NOT_ASSIGNED, ACCEPTED], 60)
    assert miner.submissions == [("task", "accepted")]
    assert miner.service.generated == 1


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refusal_for_good_ends_the_task_with_an_empty_result(tmp_path: Path, status: int) -> None:
    refused = Answer(status=status)
    pulls = [f"task {number}" for number in range(100)]
    miner = mine(tmp_path, pulls, [refused, EMPTY] * 100, 4 * 3600)
    assert {outcome for _, outcome in miner.submissions} == {"refused"}
    sent = [synapse for _, synapse in miner.validator.submissions]
    assert [bool(each.results) for each in sent] == [True, False] * (len(sent) // 2)
    assert len(miner.validator.pulled_at) >= 45
    assert len(sent) == 2 * len(miner.submissions)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [401, 408, 425, 429, 500, 503, None])
def test_what_may_pass_is_tried_for_300_s_and_ended_if_the_validator_still_wants_it(
    tmp_path: Path, status: int | None
) -> None:
    """Its uploads alone fail: nothing of it gets through but the empty one."""

    class Uploads(Scripted):
        async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
            if isinstance(synapse, SubmitResults):
                self.answers[0] = Answer(status=status) if synapse.results else EMPTY
                if synapse.results == "":
                    self.pulls = deque()
            return await super().call(target_axon, synapse, timeout, deserialize)

    async def main() -> None:
        miner = Miner(Uploads(["task"] * 100, [EMPTY]), tmp_path)
        await miner.run(1500)
        assert miner.submissions == [("task", "given_up")]
        assert miner.service.generated == 1
        *uploads, (last, empty) = miner.validator.submissions
        assert empty.results == ""
        assert 200 < last - uploads[0][0] < 700
        assert len(uploads) < 60
        assert os.listdir(tmp_path) == []

    virtual_time.run(main())


def test_a_validator_that_takes_nothing_at_all_costs_one_generation(tmp_path: Path) -> None:
    miner = mine(tmp_path, ["task"] * 1000, [Answer(status=413)], 3000)
    assert miner.submissions == [("task", "refused")]
    assert miner.service.generated == 1
    assert len(miner.validator.submissions) < 20


# --- a validator that does not know us


def stranger() -> PullTask:
    return PullTask(cooldown_until=int(virtual_time.EPOCH) + 3600)


def test_a_freshly_registered_miner_asks_every_five_minutes(tmp_path: Path) -> None:
    class Unsynced(Scripted):
        async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
            if isinstance(synapse, PullTask) and len(self.pulled_at) < 3:
                self.pulls.appendleft(PullTask(cooldown_until=int(self.clock()) + 3600))
            return await super().call(target_axon, synapse, timeout, deserialize)

    async def main() -> None:
        miner = Miner(Unsynced(["task"], [ACCEPTED]), tmp_path)
        await miner.run(1000)
        waits = [
            later - at for at, later in zip(miner.validator.pulled_at, miner.validator.pulled_at[1:], strict=False)
        ]
        assert waits[:3] == pytest.approx([300] * 3, abs=2)
        assert miner.submissions == [("task", "accepted")]

    virtual_time.run(main())


def test_a_validator_that_refuses_without_a_reason_is_asked_less_and_less(tmp_path: Path) -> None:
    """After half a minute, until the pause that doubles from 1 s on is longer than that."""
    pulled_at = mine(tmp_path, [PullTask()] * 12, [ACCEPTED], 2000).validator.pulled_at
    waits = [later - at for at, later in itertools.pairwise(pulled_at)]
    assert waits[:10] == pytest.approx([30, 30, 30, 30, 30, 32, 64, 128, 256, 300], abs=0.5)


def test_a_validator_that_has_handed_out_tasks_is_believed(tmp_path: Path) -> None:
    class Deregistered(Scripted):
        async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
            if isinstance(synapse, PullTask) and len(self.pulled_at) == 1:
                self.pulls.appendleft(PullTask(cooldown_until=int(self.clock()) + 3600))
            return await super().call(target_axon, synapse, timeout, deserialize)

    async def main() -> None:
        miner = Miner(Deregistered(["task"], [ACCEPTED]), tmp_path)
        await miner.run(3000)
        assert len(miner.validator.pulled_at) == 2

    virtual_time.run(main())


# --- after a restart


def spooled(folder: Path, name: str, age: float, result: bytes = b"result") -> Path:
    Spool(folder).put(SpooledResult(VALIDATOR.hotkey, TextTask(id=name, prompt=f"prompt of {name}"), result))
    (path,) = folder.glob("*.result")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_restart_asks_first_and_hands_in_what_is_asked_for(tmp_path: Path) -> None:
    spooled(tmp_path, "task", age=100)
    miner = mine(tmp_path, ["task"], [ACCEPTED], 100)
    assert miner.validator.pulled_at[0] < miner.validator.submissions[0][0]
    assert miner.submissions == [("task", "accepted")]
    assert miner.service.generated == 0


@pytest.mark.parametrize(
    ("pull", "known"),
    [(150.0, ["unknown", "accepted"]), (750.0, ["declined"]), ("another", ["unknown", "accepted"])],
)
def test_a_restart_finds_out_what_became_of_a_result_that_is_not_asked_for(
    tmp_path: Path, pull: str | float, known: list[str]
) -> None:
    spooled(tmp_path, "task", age=100)
    pulls = [pull, *(["another"] if pull != "another" else [])]
    miner = mine(tmp_path, pulls, [replace(ACCEPTED, count=1 + (known[-1] == "accepted"))], 900)
    assert [outcome for name, outcome in miner.submissions + miner.settlements if name == "task"] == known
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("pull", [150.0, 750.0, "another"])
def test_a_restart_knows_an_empty_result_for_what_it_is(tmp_path: Path, pull: str | float) -> None:
    """Whatever the validator made of it: it can not have been accepted or declined."""
    spooled(tmp_path, "task", age=100, result=b"")
    miner = mine(tmp_path, [pull], [ACCEPTED], 100)
    assert [outcome for name, outcome in miner.submissions if name == "task"] == ["empty"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_restart_finds_is_not_rewritten_and_expires_by_its_true_age(tmp_path: Path) -> None:
    path = spooled(tmp_path, "task", age=MAX_AGE_S - 50)
    written_at = path.stat().st_mtime
    miner = mine(tmp_path, [None, *["task"] * 20], [Answer(status=503), LOST], 200)
    assert miner.submissions == []
    assert miner.service.generated == 0
    assert len(miner.validator.submissions) > 5
    assert path.stat().st_mtime == written_at
    os.utime(path, (time.time() - MAX_AGE_S - 1,) * 2)
    miner = mine(tmp_path, ["task"], [ACCEPTED], 200)
    assert miner.service.generated == 1
    assert miner.submissions == [("task", "accepted")]


def test_a_restart_knows_what_cooldown_is_usual(tmp_path: Path) -> None:
    """50 s with this validator, so that 140 s are a declined result's."""
    spooled(tmp_path, "task", age=5)

    async def main() -> None:
        history = [PastSubmission(now() - 100, VALIDATOR.hotkey, "before", "accepted", 1.0, 1, 50.0)]
        miner = Miner(Scripted([140.0], [ACCEPTED]), tmp_path, history)
        await miner.run(10)
        assert miner.submissions == [("task", "declined")]

    virtual_time.run(main())


def test_a_result_expires_while_the_miner_runs(tmp_path: Path) -> None:
    path = spooled(tmp_path, "task", age=MAX_AGE_S - 50)
    spool = Spool(tmp_path)
    task = TextTask(id="task", prompt="prompt of task")
    assert spool.get(VALIDATOR.hotkey, task) is not None
    os.utime(path, (time.time() - MAX_AGE_S - 1,) * 2)
    assert spool.get(VALIDATOR.hotkey, task) is None


async def test_what_is_unknown_is_settled_after_a_restart_too(tmp_path: Path) -> None:
    books = Bookkeeping(tmp_path / "ledger.sqlite", 0, 0.0)
    books.start()
    told = Feedback(task_fidelity_score=0.8, generations_within_the_window=5)
    books.record(Submission(VALIDATOR, "before", "accepted", 1.0, 10, told))
    books.record(Submission(VALIDATOR, "task", "unknown", 1.0, 10, None, books._now() + 250))
    await books.close()
    history = await Bookkeeping(tmp_path / "ledger.sqlite", 0, 0.0).submissions()
    assert [(past.task_id, past.outcome, past.accepted_in_window) for past in history] == [
        ("before", "accepted", 5),
        ("task", "unknown", None),
    ]
    settled: list[tuple[int, SubmissionOutcome]] = [(6, "broken"), (7, "accepted")]
    for count, outcome in settled:
        events: list[Event] = []
        directory = ValidatorDirectory(Eligibility(KEYPAIR.ss58_address, "rehearsal", frozenset()))
        after = Submitter(
            Scripted([], []), directory, ValidatorClocks(), KEYPAIR, Spool(tmp_path / "spool"), events.append, history
        )
        memory = after._memories[VALIDATOR.hotkey]
        at = books._now() + 300
        found = memory.window.answered(at, count, Span(at - 5, at), [each.span for each in memory.unsettled])
        after._settle(VALIDATOR, memory, found)
        # Of the five from before the ledger began it is not known when they leave.
        assert events == [Settlement(VALIDATOR, "task", outcome if outcome == "accepted" else "unknown")]


# --- the window


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.floats(0, 0.5))
def test_the_count_never_tells_what_is_not_so(seed: int, before: int, lost: float) -> None:
    """A validator's own list of finish times, and answers of which some are lost."""
    randomness = random.Random(seed)
    at = 1_800_000_000.0
    finished = deque(sorted(int(at - randomness.uniform(0, WINDOW_S)) for _ in range(before)))
    window, unsettled, truth = Window(), [], []
    window.answered(at, len(finished))
    for _ in range(120):
        at += randomness.choice([300.0, 300.0, 330.0, 900.0])
        accepted = randomness.random() < 0.7
        if accepted:
            finished.append(int(at))
        while finished and finished[0] <= int(at) - WINDOW_S:
            finished.popleft()
        here = at + randomness.uniform(0, 2)  # when its answer is here
        span = Span(here - 5, here)
        if randomness.random() < lost:
            unsettled.append(span)
            truth.append(accepted)
            continue
        verdicts = window.answered(here, len(finished), span if accepted else None, unsettled)
        # Of several in a row it is their number that is known, and not which.
        assert sum(verdict is True for verdict in verdicts) <= sum(truth)
        assert sum(verdict is not False for verdict in verdicts) >= sum(truth)
        assert len(truth) != 1 or verdicts[0] in (None, truth[0])
        unsettled, truth = [], []


def test_a_count_that_fell_for_no_reason_tells_nothing() -> None:
    window = Window()
    for number in range(10):
        window.answered(300.0 * number, number + 1, Span(300.0 * number - 5, 300.0 * number))
    assert window.answered(3000.0, 8, Span(2995.0, 3000.0), [Span(2700.0, 2710.0)]) == [None]
    # And what it says from then on is right again.
    assert window.answered(3300.0, 9, None, [Span(3100.0, 3110.0)]) == [True]
    assert window.answered(3600.0, 10, Span(3595.0, 3600.0), [Span(3400.0, 3410.0)]) == [False]


@pytest.mark.parametrize("count", [-(2**53), -1, 0, 2**53])
def test_a_hostile_count_is_survived(count: int) -> None:
    window = Window()
    for number in range(3):
        window.answered(300.0 * number, count, Span(300.0 * number - 5, 300.0 * number), [Span(0.0, 1.0)])
    assert len(window) <= WINDOW_S
