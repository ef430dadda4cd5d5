"""What becomes of results that an earlier run left in the spool."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from neurons.miner.records.bookkeeping import Bookkeeping
from neurons.miner.records.events import Submission, SubmissionOutcome
from neurons.miner.records.verdicts import PastSubmission, Span
from neurons.miner.submission.outcomes import Outcomes, Settled
from neurons.miner.submission.spool import MAX_AGE_S, Spool, SpooledResult
from neurons.protocol import Feedback, TextTask
from scripts.bench import virtual_time
from scripts.bench.virtual_time import now
from tests.support.scripted_validator import ACCEPTED, LOST, VALIDATOR, Answer, Miner, Scripted, mine


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
    assert [event.size for event in miner.events if isinstance(event, Submission)] == [len(b"result")]
    assert miner.service.generated == 0


def test_a_result_is_handed_in_to_a_validator_that_is_not_worth_another_task(tmp_path: Path) -> None:
    spooled(tmp_path, "task", age=100)

    async def main() -> None:
        miner = Miner(Scripted(["task"], [ACCEPTED]), tmp_path)
        miner.books.left_alone_until[VALIDATOR.hotkey] = now() + 3600
        await miner.run(100)
        assert miner.submissions == [("task", "accepted")]

    virtual_time.run(main())


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


@pytest.mark.parametrize(("score", "outcome"), [(0.8, "declined"), (None, "unknown")])
def test_a_restart_knows_what_cooldown_is_usual(tmp_path: Path, score: float | None, outcome: str) -> None:
    """50 s with this validator, so that 140 s are a declined result's.

    A result without a score was accepted by the count, and its cooldown may be the rest of an earlier answer's.
    """
    spooled(tmp_path, "task", age=5)

    async def main() -> None:
        history = [PastSubmission(now() - 100, VALIDATOR.hotkey, "before", "accepted", 1.0, 1, 50.0, score)]
        miner = Miner(Scripted([140.0], [ACCEPTED]), tmp_path, history)
        await miner.run(10)
        assert miner.submissions == [("task", outcome)]

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
    assert [(past.task_id, past.outcome, past.accepted_in_window, past.score) for past in history] == [
        ("before", "accepted", 5, 0.8),
        ("task", "unknown", None, None),
    ]
    settled: list[tuple[int, SubmissionOutcome]] = [(6, "broken"), (7, "accepted")]
    for count, outcome in settled:
        outcomes = Outcomes()
        for past in history:
            outcomes.remember(past)
        at = books._now() + 300
        counted = Feedback(task_fidelity_score=0.8, generations_within_the_window=count)
        _, found = outcomes.answered("next", 10, counted, int(at) + 300, 300.0, Span(at - 5, at), False)
        # Of the five from before the ledger began it is not known when they leave.
        assert found == [Settled("task", outcome if outcome == "accepted" else "unknown")]
