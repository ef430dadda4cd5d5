"""Subnet 17's wire protocol: the two synapses and the message that a submission is signed over.

A synapse's class name is its HTTP route on the validator's axon. An axon first rebuilds a synapse from the request's
headers, and those carry only fields declared without a default: that is why `results`, `submit_time` and `signature`
have none.
"""

from __future__ import annotations

import base64
import binascii
import time
from typing import Literal

import bittensor as bt
from pydantic import BaseModel

DECLARATION = (
    "I, as a miner on SN17, have obtained all licenses, rights and consents required to use, reproduce, modify, "
    "display, distribute and make available my submitted results to this subnet and its end users"
)
PULL_TIMEOUT_S = 12.0
SUBMIT_TIMEOUT_S = 300.0
COMPRESSION_SPZ = 2


class TextTask(BaseModel):
    """A prompt to turn into a splat. Older validators send no `type`, which makes theirs this one."""

    type: Literal["text"] = "text"
    id: str
    prompt: str


class ImageTask(BaseModel):
    """An image to turn into a splat; `prompt` is the image in base64."""

    type: Literal["image"] = "image"
    id: str
    prompt: str


Task = TextTask | ImageTask


class Feedback(BaseModel):
    validation_failed: bool = False
    task_fidelity_score: float = 0.0
    average_fidelity_score: float = 0.0
    generations_within_the_window: int = 0
    current_duel_rating: float = 0.0
    current_miner_reward: float = 0.0


class PullTask(bt.Synapse):
    """Asks a validator for a task. A `task` of None with `cooldown_until` 0 is a refusal without a reason."""

    task: Task | None = None
    validation_threshold: float = 0.6
    throttle_period: int = 0
    cooldown_until: int = 0
    cooldown_violations: int = 0


class SubmitResults(bt.Synapse):
    """Hands in a result; empty `results` say that nothing worth submitting was made.

    The validator fills in `feedback` and `cooldown_until` (unix seconds).
    """

    task: Task | None = None
    task_id: str = ""
    results: str
    data_format: str = "ply"
    data_ver: int = 0
    compression: int = COMPRESSION_SPZ
    submit_time: int
    signature: str
    feedback: Feedback | None = None
    cooldown_until: int = 0


def signed_message(submit_time: int, prompt: str, validator_hotkey: str, miner_hotkey: str) -> bytes:
    """What a submission's signature covers. `submit_time` is in nanoseconds."""
    return f"{DECLARATION}{submit_time}{prompt}{validator_hotkey}{miner_hotkey}".encode()


def make_submission(task: Task, result: bytes, validator_hotkey: str, keypair: bt.Keypair) -> SubmitResults:
    """A signed submission of `result` (`.spz`, or b"" for nothing)."""
    submit_time = time.time_ns()
    message = signed_message(submit_time, task.prompt, validator_hotkey, keypair.ss58_address)
    return SubmitResults(
        # Validators that know no `task_id` yet look here; those that know it know image tasks, whose prompt is large.
        task=task if isinstance(task, TextTask) else None,
        task_id=task.id,
        results=base64.b64encode(result).decode(),
        submit_time=submit_time,
        signature=base64.b64encode(keypair.sign(message)).decode(),
    )


def signature_is_valid(submission: SubmitResults, prompt: str, validator_hotkey: str, miner_hotkey: str) -> bool:
    """Whether `miner_hotkey` signed exactly this submission of `prompt` to `validator_hotkey`."""
    message = signed_message(submission.submit_time, prompt, validator_hotkey, miner_hotkey)
    try:
        signature = base64.b64decode(submission.signature, validate=True)
        return bool(bt.Keypair(ss58_address=miner_hotkey).verify(message, signature))
    except (binascii.Error, ValueError):
        return False
