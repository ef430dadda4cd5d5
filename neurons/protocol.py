"""Subnet 17's wire protocol: the two synapses and the message that a submission is signed over.

A synapse's class name is its HTTP route on the validator's axon. An axon first rebuilds a synapse from the request's
headers, and those carry only fields declared without a default: that is why `results`, `submit_time` and `signature`
have none.

A validator's answer is untrusted: `ANSWER_FIELDS` names all that is taken from it, and the types here bound it.
Answers are not authenticated: only the miner's requests are signed in this protocol.
"""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

import bittensor as bt
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

DECLARATION = (
    "I, as a miner on SN17, have obtained all licenses, rights and consents required to use, reproduce, modify, "
    "display, distribute and make available my submitted results to this subnet and its end users"
)
PULL_TIMEOUT_S = 12.0
# Seconds. A validator gives its scoring service 300, and tells a miner that waits longer when that did not answer.
SUBMIT_TIMEOUT_S = 330.0
COMPRESSION_SPZ = 2
# Larger than any real date or count, and exact in a float and in the database.
LARGEST_INTEGER = 1 << 53


def _with_utf8(text: str) -> str:
    text.encode()  # lone surrogates, which JSON can express, raise a ValueError here
    return text


Integer = Annotated[int, AfterValidator(lambda value: min(max(value, -LARGEST_INTEGER), LARGEST_INTEGER))]
Text = Annotated[str, AfterValidator(_with_utf8)]


# Characters: many times what a validator's scoring accepts (1,024), and what a UUID has (36).
MAX_PROMPT_CHARACTERS = 65_536
MAX_ID_CHARACTERS = 1024


class TextTask(BaseModel):
    """A prompt to turn into a splat. Older validators send no `type`, which makes theirs this one."""

    type: Literal["text"] = "text"
    id: Annotated[Text, Field(max_length=MAX_ID_CHARACTERS)]
    prompt: Annotated[Text, Field(max_length=MAX_PROMPT_CHARACTERS)]


class ImageTask(BaseModel):
    """An image to turn into a splat; `prompt` is the image in base64."""

    type: Literal["image"] = "image"
    id: Annotated[Text, Field(max_length=MAX_ID_CHARACTERS)]
    prompt: Text


Task = TextTask | ImageTask


class Feedback(BaseModel):
    """A validator's answer about a result and its miner. Values that make no sense are replaced by the defaults."""

    model_config = ConfigDict(allow_inf_nan=False)

    validation_failed: bool = False
    task_fidelity_score: float = 0.0
    average_fidelity_score: float = 0.0
    generations_within_the_window: Integer = 0
    current_duel_rating: float = 0.0
    current_miner_reward: float = 0.0

    @field_validator("*", mode="wrap")
    @classmethod
    def _drop_nonsense(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        return _validated_or_default(cls, value, handler, info)


class PullTask(bt.Synapse):
    """Asks a validator for a task. A `task` of None with `cooldown_until` 0 is a refusal without a reason."""

    task: Task | None = None
    validation_threshold: float = 0.6
    throttle_period: Integer = 0
    cooldown_until: Integer = 0
    cooldown_violations: Integer = 0


class SubmitResults(bt.Synapse):
    """Submits a result; empty `results` mean that nothing worth submitting was made.

    The validator fills in `feedback` and `cooldown_until` (unix seconds). Values that make no sense are replaced by the
    defaults: the validator has the result all the same, and must not get it twice.
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
    cooldown_until: Integer = 0

    @field_validator("feedback", "cooldown_until", mode="wrap")
    @classmethod
    def _drop_nonsense(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        return _validated_or_default(cls, value, handler, info)


def _validated_or_default(
    model: type[BaseModel], value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return model.model_fields[info.field_name or ""].get_default()


ANSWER_FIELDS: dict[type[bt.Synapse], tuple[str, ...]] = {
    PullTask: ("task", "validation_threshold", "throttle_period", "cooldown_until", "cooldown_violations"),
    SubmitResults: ("feedback", "cooldown_until"),
}


def signed_message(submit_time: int, prompt: str, validator_hotkey: str, miner_hotkey: str) -> bytes:
    """What a submission's signature covers. `submit_time` is in nanoseconds."""
    return f"{DECLARATION}{submit_time}{prompt}{validator_hotkey}{miner_hotkey}".encode()


def make_submission(task: Task, result: bytes, validator_hotkey: str, keypair: bt.Keypair) -> SubmitResults:
    """A signed submission of `result` (`.spz`, or b"" for an empty one)."""
    submit_time = time.time_ns()
    message = signed_message(submit_time, task.prompt, validator_hotkey, keypair.ss58_address)
    return SubmitResults(
        # For older validators, which do not know `task_id`. Image tasks, whose prompt is large, need newer ones anyway.
        task=task if isinstance(task, TextTask) else None,
        task_id=task.id,
        results=base64.b64encode(result).decode(),
        submit_time=submit_time,
        signature=base64.b64encode(keypair.sign(message)).decode(),
    )
