"""What the miner makes of a validator's answers, scripted field by field as the public validator gives them.

Nothing in here asks the rehearsal's rules. An answer to a submission is its status, `validation_failed`,
`task_fidelity_score`, the seconds that `cooldown_until` lies ahead, and how many results the validator counts.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neurons.miner.records.events import Submission
from neurons.miner.submission.spool import Spool, SpooledResult
from neurons.protocol import PullTask, SubmitResults
from scripts.bench import virtual_time
from tests.support.scripted_validator import (
    ACCEPTED,
    BROKEN,
    CLOCK_AHEAD_S,
    DECLINED,
    EMPTY,
    KEYPAIR,
    LOST,
    NOT_ASSIGNED,
    REPETITION,
    SECOND_AFTER_ACCEPTED,
    VALIDATOR,
    Answer,
    Miner,
    Scripted,
    mine,
)
from tests.support.signatures import signature_is_valid


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("neurons"):
            logging.getLogger(name).setLevel(logging.NOTSET)


def declined_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if "did not accept" in line]


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
    assert {event.reason for event in miner.events if isinstance(event, Submission)} == {""}
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


def test_after_an_outcome_that_was_told_the_next_repetition_costs_no_longer_pause(tmp_path: Path) -> None:
    miner = mine(tmp_path, ["one", "one", "two", "two"], [REPETITION, ACCEPTED, REPETITION, ACCEPTED], 800)
    assert miner.submissions == [("one", "accepted"), ("two", "accepted")]
    sent = [at for at, _ in miner.validator.submissions]
    assert 30 <= sent[1] - sent[0] < 33
    assert 30 <= sent[3] - sent[2] < 33


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


def test_what_is_left_of_a_cooldown_is_no_measure_of_the_next_one(tmp_path: Path) -> None:
    """The later of two that overlapped is answered with the first one's cooldown, of which 25 s are left by then."""
    later = replace(SECOND_AFTER_ACCEPTED, ahead=25)
    answers = [LOST, later, LOST, NOT_ASSIGNED, replace(ACCEPTED, count=3)]
    miner = mine(tmp_path, ["first", "second", 275.0, "third"], answers, 700)
    assert miner.submissions == [("first", "accepted"), ("second", "unknown"), ("third", "accepted")]
    assert miner.settlements == [("second", "accepted")]


@pytest.mark.parametrize("before", [ACCEPTED, BROKEN], ids=["accepted", "broken"])
def test_what_cooldown_is_usual_is_learned_from_what_costs_nothing(tmp_path: Path, before: Answer) -> None:
    """50 s with this validator, so that 140 s are a declined result's. By the default of 300 s they were not."""
    answers = [replace(before, ahead=50), LOST, NOT_ASSIGNED, replace(ACCEPTED, count=1)]
    miner = mine(tmp_path, ["first", "second", 140.0, "third"], answers, 700)
    assert ("second", "declined") in miner.submissions


def test_a_slow_answer_is_no_measure_of_a_short_cooldown(tmp_path: Path) -> None:
    """How old its Date header is can not be told, and the cooldown in it is the usual one."""
    slow = replace(ACCEPTED, ahead=270, seconds=280.0)
    answers = [slow, LOST, NOT_ASSIGNED, replace(ACCEPTED, count=3)]
    miner = mine(tmp_path, ["first", "second", 275.0, "third"], answers, 1200)
    assert miner.submissions == [("first", "accepted"), ("second", "unknown"), ("third", "accepted")]
    assert miner.settlements == [("second", "accepted")]


def test_old_results_that_leave_the_window_hide_no_accepted_one(tmp_path: Path) -> None:
    """49 tasks in 4 hours: when the answer to the last one is lost, the first has left, and the count is as before."""
    tasks = [f"task {number}" for number in range(49)]
    answers = [replace(ACCEPTED, ahead=290, count=number + 1) for number in range(48)]
    miner = mine(tmp_path, [*tasks, 270.0, "last"], [*answers, LOST, NOT_ASSIGNED, replace(ACCEPTED, count=48)], 15100)
    assert miner.submissions[48:] == [("task 48", "unknown"), ("last", "accepted")]
    assert miner.settlements == [("task 48", "accepted")]


@pytest.mark.parametrize("lost", [LOST, Answer(status=500)], ids=["lost", "500"])
def test_a_repetition_soon_after_a_lost_answer_meets_the_lock(tmp_path: Path, lost: Answer) -> None:
    """One later than 30 s after the first would be scored beside it: then a pull comes first."""
    miner = mine(tmp_path, ["task"] * 5, [*[lost] * 8, REPETITION, ACCEPTED], 250)
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
    reasons = {event.reason for event in miner.events if isinstance(event, Submission)}
    assert [reason.split()[0] for reason in reasons] == [str(status)]
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


def test_after_a_task_a_refusal_without_a_reason_costs_half_a_minute_again(tmp_path: Path) -> None:
    miner = mine(tmp_path, [*[PullTask()] * 8, "task", PullTask(), "another"], [ACCEPTED] * 2, 1200)
    refused, again = miner.validator.pulled_at[9:11]
    assert again - refused == pytest.approx(30, abs=0.5)


def test_a_miner_that_is_registered_again_loses_no_hour(tmp_path: Path) -> None:
    """Its validators gave it tasks before, do not know it until they read the chain, and count no violation."""

    class Unsynced(Scripted):
        async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
            if isinstance(synapse, PullTask) and len(self.pulled_at) in (1, 2):
                self.pulls.appendleft(PullTask(cooldown_until=int(self.clock()) + 3600))
            return await super().call(target_axon, synapse, timeout, deserialize)

    async def main() -> None:
        miner = Miner(Unsynced(["before", "after"], [ACCEPTED] * 2), tmp_path)
        await miner.run(1200)
        assert miner.submissions == [("before", "accepted"), ("after", "accepted")]

    virtual_time.run(main())


def test_an_hour_that_counts_as_a_violation_is_a_cooldown(tmp_path: Path) -> None:
    _, _, *later = mine(tmp_path, ["task", 3600.0], [ACCEPTED], 3000).validator.pulled_at
    assert not later
