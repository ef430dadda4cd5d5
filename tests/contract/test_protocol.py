"""neurons.protocol: the wire shapes of subnet 17 and the signature over a submission."""

from __future__ import annotations

import ast
import base64
import json
from pathlib import Path

import bittensor as bt
import pytest

from neurons.protocol import (
    DECLARATION,
    Feedback,
    ImageTask,
    PullTask,
    SubmitResults,
    TextTask,
    make_submission,
    signed_message,
)
from tests.support.signatures import signature_is_valid

KEYPAIR = bt.Keypair.create_from_uri("//miner")
VALIDATOR = bt.Keypair.create_from_uri("//validator").ss58_address
TASK = TextTask(id="0f3c", prompt="a red cube, größer")


def test_the_signed_message_is_the_protocol_s_to_the_byte() -> None:
    assert signed_message(123, "größer", "V", "M") == (
        b"I, as a miner on SN17, have obtained all licenses, rights and consents required to use, reproduce, modify, "
        b"display, distribute and make available my submitted results to this subnet and its end users"
        b"123gr\xc3\xb6\xc3\x9ferVM"
    )
    assert not DECLARATION.endswith((" ", "\n"))


def test_a_submission_is_signed_by_the_hotkey_over_that_message() -> None:
    submission = make_submission(TASK, b"spz", VALIDATOR, KEYPAIR)
    message = signed_message(submission.submit_time, TASK.prompt, VALIDATOR, KEYPAIR.ss58_address)
    assert KEYPAIR.verify(message, base64.b64decode(submission.signature))
    assert submission.results == "c3B6"
    assert (submission.task_id, submission.compression, submission.data_format, submission.data_ver) == (
        "0f3c",
        2,
        "ply",
        0,
    )
    assert submission.submit_time > 10**18  # nanoseconds


def test_a_tampered_submission_does_not_verify() -> None:
    good = make_submission(TASK, b"spz", VALIDATOR, KEYPAIR)
    other = bt.Keypair.create_from_uri("//other").ss58_address

    def valid(prompt: str = TASK.prompt, validator: str = VALIDATOR, miner: str = KEYPAIR.ss58_address) -> bool:
        return signature_is_valid(good, prompt, validator, miner)

    assert valid()
    assert not valid(prompt="a blue cube")
    assert not valid(validator=other)
    assert not valid(miner=other)
    assert not valid(miner="no address")
    good.submit_time += 1
    assert not valid()
    good.submit_time -= 1
    for signature in ("", "!", base64.b64encode(bytes(64)).decode(), base64.b64encode(bytes(3)).decode()):
        good.signature = signature
        assert not valid()


def test_an_axon_can_rebuild_a_submission_from_its_headers() -> None:
    submission = make_submission(TASK, b"spz", VALIDATOR, KEYPAIR)
    assert set(SubmitResults.model_json_schema()["required"]) == {"results", "submit_time", "signature"}
    rebuilt = SubmitResults.from_headers(submission.to_headers())
    assert isinstance(rebuilt, SubmitResults)
    assert (rebuilt.results, rebuilt.submit_time, rebuilt.signature) == ("", 0, "")
    empty = PullTask.from_headers(PullTask().to_headers())
    assert isinstance(empty, PullTask)
    assert empty.task is None


def test_defaults_are_the_protocol_s() -> None:
    pull = PullTask()
    assert (pull.task, pull.validation_threshold, pull.throttle_period) == (None, 0.6, 0)
    assert (pull.cooldown_until, pull.cooldown_violations) == (0, 0)
    submission = SubmitResults(results="", submit_time=1, signature="")
    assert (submission.task, submission.task_id, submission.data_format, submission.data_ver) == (None, "", "ply", 0)
    assert (submission.compression, submission.feedback, submission.cooldown_until) == (2, None, 0)
    assert Feedback().model_dump() == {
        "validation_failed": False,
        "task_fidelity_score": 0.0,
        "average_fidelity_score": 0.0,
        "generations_within_the_window": 0,
        "current_duel_rating": 0.0,
        "current_miner_reward": 0.0,
    }


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"id": "1", "prompt": "p"}, TextTask(id="1", prompt="p")),  # an older validator's
        ({"type": "text", "id": "1", "prompt": "p"}, TextTask(id="1", prompt="p")),
        ({"type": "image", "id": "1", "prompt": "aGk="}, ImageTask(id="1", prompt="aGk=")),
        ({"type": "text", "id": "1", "prompt": "p", "priority": 3}, TextTask(id="1", prompt="p")),  # a newer one's
        (None, None),
    ],
)
def test_pulled_tasks_of_older_and_newer_validators(task: object, expected: object) -> None:
    answer = json.loads(json.dumps({"task": task, "cooldown_until": 5, "field_of_tomorrow": {}}))
    assert PullTask(**answer).task == expected


def test_an_unknown_task_type_is_refused() -> None:
    with pytest.raises(ValueError, match="Input should be 'text'"):
        PullTask.model_validate({"task": {"type": "video", "id": "1", "prompt": "p"}})


def test_an_image_is_not_sent_back_with_its_result() -> None:
    submission = make_submission(ImageTask(id="1", prompt="aGk="), b"", VALIDATOR, KEYPAIR)
    assert (submission.task, submission.task_id, submission.results) == (None, "1", "")
    assert signature_is_valid(submission, "aGk=", VALIDATOR, KEYPAIR.ss58_address)


def test_neurons_import_neither_torch_nor_the_generation_service() -> None:
    for path in (Path(__file__).parents[2] / "neurons").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & {"torch", "torchvision", "generation"}, path
