"""Any answer that a validator may give, and anything that it may have signed: what is taken, by property."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import bittensor as bt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurons.miner.validators.dendrite import fill, parse
from neurons.protocol import (
    LARGEST_INTEGER,
    Feedback,
    ImageTask,
    PullTask,
    SubmitResults,
    TextTask,
    make_submission,
    signed_message,
)

MINER = bt.Keypair.create_from_uri("//miner")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(st.characters())  # surrogates too
    | st.sampled_from(["text", "image", "1", "0.5", "nan", "1e999"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
tasks = st.fixed_dictionaries({}, optional={"type": json_values, "id": json_values, "prompt": json_values})
feedbacks = st.fixed_dictionaries({}, optional={name: json_values for name in (*Feedback.model_fields, "of_tomorrow")})
terminals = st.fixed_dictionaries({}, optional={"status_code": json_values, "hotkey": json_values})
answers = st.fixed_dictionaries(
    {},
    optional={
        **{name: json_values for name in ("results", "signature", "submit_time", "task_id", "name", "timeout", "new")},
        **{name: json_values for name in ("validation_threshold", "throttle_period", "cooldown_violations")},
        "cooldown_until": json_values,
        "task": json_values | tasks,
        "feedback": json_values | feedbacks,
        "dendrite": json_values | terminals,
        "axon": json_values | terminals,
    },
)


@settings(max_examples=300, deadline=None)
@given(answers)
def test_a_pull_s_answer_is_sound_or_refused(answer: dict[str, Any]) -> None:
    pull = PullTask()
    try:
        fill(pull, parse(json.dumps(answer).encode()))
    except ValueError:
        return
    assert pull.task is None or isinstance(pull.task, TextTask | ImageTask)
    if pull.task is not None:
        pull.task.id.encode()
        make_submission(pull.task, b"", MINER.ss58_address, MINER)
    for number in (pull.throttle_period, pull.cooldown_until, pull.cooldown_violations):
        assert isinstance(number, int)
        assert abs(number) <= LARGEST_INTEGER
    assert isinstance(pull.validation_threshold, float)
    untouched = PullTask()
    for name in ("name", "timeout", "dendrite", "axon"):
        assert getattr(pull, name) == getattr(untouched, name)


@settings(max_examples=300, deadline=None)
@given(answers)
def test_a_submission_s_answer_is_taken_whatever_it_says(answer: dict[str, Any]) -> None:
    submission = SubmitResults(results="r", submit_time=1, signature="s")
    fill(submission, parse(json.dumps(answer).encode()))
    assert (submission.results, submission.signature, submission.submit_time) == ("r", "s", 1)
    assert isinstance(submission.cooldown_until, int)
    assert abs(submission.cooldown_until) <= LARGEST_INTEGER
    if submission.feedback is not None:
        json.dumps(submission.feedback.model_dump(), allow_nan=False)
        assert abs(submission.feedback.generations_within_the_window) <= LARGEST_INTEGER


PULLED = {
    "task": {"type": "image", "id": "1", "prompt": "AAAA"},
    "validation_threshold": 0.65,
    "throttle_period": 30,
    "cooldown_until": 1_800_000_000,
    "cooldown_violations": 7,
}
FED_BACK = {
    "validation_failed": True,
    "task_fidelity_score": 0.8,
    "average_fidelity_score": 0.9,
    "generations_within_the_window": 40,
    "current_duel_rating": 1510.5,
    "current_miner_reward": 60_420.0,
}


def test_all_that_a_validator_fills_in_is_taken() -> None:
    pull, submission = PullTask(), SubmitResults(results="r", submit_time=1, signature="s")
    fill(pull, PULLED)
    assert pull.model_dump(include=set(PULLED)) == PULLED
    fill(submission, {"feedback": FED_BACK, "cooldown_until": 1_800_000_300})
    assert submission.feedback is not None
    assert submission.feedback.model_dump() == FED_BACK
    assert submission.cooldown_until == 1_800_000_300


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(parse(body), dict)


@pytest.mark.parametrize("task", [{"id": "1", "prompt": "ab " * 30_000}, {"id": "1" * 2000, "prompt": "p"}])
def test_a_text_task_of_megabytes_is_no_task(task: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="Value should have at most"):
        fill(PullTask(), parse(json.dumps({"task": {"type": "text", **task}}).encode()))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "Expecting value"),
        ("[]", "no JSON object"),
        ("{}}", "Extra data"),
        ('{"task": 3}', "PullTask\ntask"),
        ('{"cooldown_until": "never"}', "PullTask\ncooldown_until"),
        ('{"task": {"id": 1}}', r"PullTask\ntask\.TextTask\.id"),
    ],
)
def test_a_pull_s_malformed_answer_is_refused(body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(PullTask(), parse(body.encode()))


names = st.sampled_from([bt.Keypair.create_from_uri(f"//{name}").ss58_address for name in ("a", "b", "c")])


@settings(max_examples=200, deadline=None)
@given(names, names, st.text(max_size=60) | names, st.text(max_size=60) | names, st.integers(0, 10**19))
def test_a_signature_holds_for_one_validator_only(first: str, second: str, p: str, q: str, submit_time: int) -> None:
    """Whatever prompt a validator hands out: what is signed for it is never what is signed for another."""
    if first != second:
        ours = signed_message(submit_time, p, first, MINER.ss58_address)
        assert ours != signed_message(submit_time, q, second, MINER.ss58_address)
        assert ours != signed_message(submit_time, p + first, second, MINER.ss58_address)


def test_what_is_signed_is_no_transaction() -> None:
    """Substrate signs payloads up to 256 bytes as they are, and longer ones by their hash of 32 bytes."""
    shortest = signed_message(0, "", MINER.ss58_address, MINER.ss58_address)
    assert len(shortest) > 256
    assert shortest.startswith(b"I, as a miner on SN17")
