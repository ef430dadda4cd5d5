"""Both ends of the protocol against the other end as others have it: validators of several ages, and another miner.

The shapes are declared here once more, as the public validator and miner have them, on bittensor's own Axon and
Dendrite.
"""

# No `from __future__ import annotations` here: Axon.attach compares the annotations themselves.

import asyncio
import base64
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Tuple  # noqa: UP035

import bittensor as bt
import pytest
from pydantic import BaseModel, Field

from neurons.chain import Neuron
from neurons.miner.validators.dendrite import ValidatorDendrite
from neurons.protocol import (
    ImageTask,
    PullTask,
    TextTask,
    make_submission,
    signed_message,
)
from neurons.rehearsal.network import RehearsalNetwork
from neurons.rehearsal.rules import Limits
from tests.support.answers import went
from tests.support.waiting import until

MINER = bt.Keypair.create_from_uri("//miner")
Shape = tuple[Any, Any]  # classes of synapses, whose fields depend on the shape


def older_shape() -> Shape:
    """One kind of task, without a type; it is submitted whole, and there is no task_id."""

    class Task(BaseModel):
        id: str = ""
        prompt: str = ""

    class OldFeedback(BaseModel):
        validation_failed: bool = False
        task_fidelity_score: float = 0.0
        average_fidelity_score: float = 0.0
        generations_within_8_hours: int = 0
        current_miner_reward: float = 0.0

    class PullTask(bt.Synapse):
        task: Task | None = None
        submit_before: int = 0
        validation_threshold: float = 0.6
        throttle_period: int = 0
        cooldown_until: int = 0
        cooldown_violations: int = 0

    class SubmitResults(bt.Synapse):
        task: Task = Field(default_factory=Task)
        results: str
        data_format: str = "ply"
        data_ver: int = 0
        compression: int = 2
        submit_time: int
        signature: str
        feedback: OldFeedback | None = None
        cooldown_until: int = 0

    return PullTask, SubmitResults


def today_s_shape() -> Shape:
    class TextTask(BaseModel):
        type: Literal["text"] = "text"
        id: str
        prompt: str

    class ImageTask(BaseModel):
        type: Literal["image"] = "image"
        id: str
        prompt: str

    class Feedback(BaseModel):
        validation_failed: bool = False
        task_fidelity_score: float = 0.0
        average_fidelity_score: float = 0.0
        generations_within_the_window: int = 0
        current_duel_rating: float = 0.0
        current_miner_reward: float = 0.0

    class PullTask(bt.Synapse):
        task: TextTask | ImageTask | None = None
        validation_threshold: float = 0.6
        throttle_period: int = 0
        cooldown_until: int = 0
        cooldown_violations: int = 0

    class SubmitResults(bt.Synapse):
        task: TextTask | ImageTask | None = None
        task_id: str = ""
        results: str
        data_format: str = "ply"
        data_ver: int = 0
        compression: int = 2
        submit_time: int
        signature: str
        feedback: Feedback | None = None
        cooldown_until: int = 0

    return PullTask, SubmitResults


def newer_shape() -> Shape:
    """Fields that this miner does not know, everywhere; the deprecated ones are gone."""

    class Extra(BaseModel):
        level: int = 3
        tags: list[str] = ["a", "b"]

    class TextTask(BaseModel):
        type: Literal["text"] = "text"
        id: str
        prompt: str
        negative_prompt: str = "blurry"
        extra: Extra = Extra()

    class ImageTask(TextTask):
        type: Literal["image"] = "image"  # type: ignore[assignment]

    class Feedback(BaseModel):
        validation_failed: bool = False
        task_fidelity_score: float = 0.0
        average_fidelity_score: float = 0.0
        generations_within_the_window: int = 0
        current_duel_rating: float = 0.0
        current_miner_reward: float = 0.0
        judges: list[Extra] = [Extra()]

    class PullTask(bt.Synapse):
        task: TextTask | ImageTask | None = None
        validation_threshold: float = 0.6
        throttle_period: int = 0
        cooldown_until: int = 0
        cooldown_violations: int = 0
        protocol: Extra = Extra()

    class SubmitResults(bt.Synapse):
        task_id: str = ""
        results: str
        compression: int = 2
        submit_time: int
        signature: str
        watermark: str | None = None
        feedback: Feedback | None = None
        cooldown_until: int = 0

    return PullTask, SubmitResults


class PublicValidator:
    """A genuine axon over synapses of the given shape, that hands out `task` and accepts what comes."""

    def __init__(self, shape: Shape, task: dict[str, Any], wallet: bt.Wallet) -> None:
        pull_class, submit_class = shape
        self.hotkey = wallet.hotkey.ss58_address
        self.submissions: list[Any] = []
        self.refuse = False

        async def pull_task(synapse: pull_class) -> pull_class:  # type: ignore[valid-type]
            fields: dict[str, Any] = {
                "task": task,
                "validation_threshold": 0.65,
                "throttle_period": 30,
                "cooldown_violations": 2,
            }
            for name, value in pull_class(**fields).model_dump(include=set(fields)).items():
                setattr(synapse, name, value)
            return synapse

        async def submit_results(synapse: submit_class) -> submit_class:  # type: ignore[valid-type]
            given: Any = synapse
            self.submissions.append(given.model_copy())
            given.results = given.signature = ""
            feedback = {"task_fidelity_score": 0.75, "current_miner_reward": 0.02, "current_duel_rating": 1500.0}
            answer = submit_class(results="", submit_time=1, signature="", feedback=feedback)
            given.feedback, given.cooldown_until = answer.feedback, 1_900_000_000
            return synapse

        def blacklist(synapse: submit_class) -> Tuple[bool, str]:  # type: ignore[valid-type]  # noqa: UP006
            return self.refuse, "no task assigned"

        self._socket = socket.create_server(("127.0.0.1", 0))
        port = self._socket.getsockname()[1]
        self._axon = bt.Axon(
            wallet=wallet, ip="127.0.0.1", port=port, external_ip="127.0.0.1", external_port=port, max_workers=1
        )
        self._axon.attach(forward_fn=pull_task)
        self._axon.attach(forward_fn=submit_results, blacklist_fn=blacklist)
        self.info = Neuron(1, self.hotkey, "127.0.0.1", port, 1e4, True).axon_info()

    async def serve(self) -> None:
        await self._axon.fast_server.serve(sockets=[self._socket])

    @property
    def started(self) -> bool:
        return self._axon.fast_server.started

    def stop(self) -> None:
        self._axon.fast_server.should_exit = True


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> bt.Wallet:
    wallet = bt.Wallet("w", "validator", str(tmp_path_factory.mktemp("wallets")))
    wallet.create_new_hotkey(use_password=False, overwrite=False, suppress=True)
    return wallet


@asynccontextmanager
async def running(validator: PublicValidator) -> AsyncIterator[ValidatorDendrite]:
    serving = asyncio.create_task(validator.serve())
    try:
        async with asyncio.timeout(30), ValidatorDendrite(MINER) as dendrite:
            await until(lambda: validator.started)
            yield dendrite
    finally:
        validator.stop()
        await serving


# --- our miner's end, their validator


@pytest.mark.parametrize("shape", [older_shape, today_s_shape, newer_shape])
async def test_a_text_task_from_pull_to_feedback(shape: Callable[[], Shape], wallet: bt.Wallet) -> None:
    validator = PublicValidator(shape(), {"id": "0f3c", "prompt": 'größer, "quoted" 🧱'}, wallet)
    async with running(validator) as dendrite:
        pulled = await dendrite.call(validator.info, PullTask(), timeout=10)
        assert pulled.is_success, pulled.dendrite
        assert pulled.task == TextTask(id="0f3c", prompt='größer, "quoted" 🧱')
        assert (pulled.validation_threshold, pulled.throttle_period, pulled.cooldown_violations) == (0.65, 30, 2)

        answer = await dendrite.call(
            validator.info, make_submission(pulled.task, b"spz", validator.hotkey, MINER), timeout=10
        )
    assert answer.is_success, answer.dendrite
    assert answer.feedback is not None
    assert (answer.feedback.task_fidelity_score, answer.feedback.current_miner_reward) == (0.75, 0.02)
    assert answer.cooldown_until == 1_900_000_000
    (submitted,) = validator.submissions
    assert base64.b64decode(submitted.results) == b"spz"
    message = signed_message(submitted.submit_time, pulled.task.prompt, validator.hotkey, MINER.ss58_address)
    assert MINER.verify(message, base64.b64decode(submitted.signature))
    if "task_id" in type(submitted).model_fields:
        assert submitted.task_id == "0f3c"
    if "task" in type(submitted).model_fields:
        assert (submitted.task.id, submitted.task.prompt) == ("0f3c", pulled.task.prompt)


@pytest.mark.parametrize("shape", [today_s_shape, newer_shape])
async def test_an_image_task_from_pull_to_feedback(shape: Callable[[], Shape], wallet: bt.Wallet) -> None:
    image = base64.b64encode(bytes(3 << 20)).decode()
    validator = PublicValidator(shape(), {"type": "image", "id": "9a", "prompt": image}, wallet)
    async with running(validator) as dendrite:
        pulled = await dendrite.call(validator.info, PullTask(), timeout=10)
        assert pulled.task == ImageTask(id="9a", prompt=image)
        answer = await dendrite.call(
            validator.info, make_submission(pulled.task, b"", validator.hotkey, MINER), timeout=10
        )
    assert answer.is_success
    (submitted,) = validator.submissions
    assert (submitted.task_id, submitted.results) == ("9a", "")
    message = signed_message(submitted.submit_time, image, validator.hotkey, MINER.ss58_address)
    assert MINER.verify(message, base64.b64decode(submitted.signature))


async def test_large_results_arrive_and_are_refused_in_good_order(wallet: bt.Wallet) -> None:
    """12 MB is a splat of 800,000 Gaussians. An axon refuses before it has read them."""
    validator = PublicValidator(today_s_shape(), {"id": "1", "prompt": "p"}, wallet)
    task, result = TextTask(id="1", prompt="p"), bytes(12 << 20)
    async with running(validator) as dendrite:
        for refuse, status in ((False, 200), (True, 403), (True, 403), (False, 200)):
            validator.refuse = refuse
            answer = await dendrite.call(
                validator.info, make_submission(task, result, validator.hotkey, MINER), timeout=20
            )
            assert went(answer)[:2] == (status, status), answer.dendrite
            assert ("no task assigned" in went(answer).message) == refuse
    assert [len(base64.b64decode(submitted.results)) for submitted in validator.submissions] == [12 << 20] * 2


async def test_an_axon_of_another_hotkey_refuses_what_is_meant_for_the_named_one(wallet: bt.Wallet) -> None:
    validator = PublicValidator(today_s_shape(), {"id": "1", "prompt": "p"}, wallet)
    named = bt.Keypair.create_from_uri("//named").ss58_address
    axon = Neuron(1, named, "127.0.0.1", validator.info.port, 1e4, True).axon_info()
    async with running(validator) as dendrite:
        for synapse in (PullTask(), make_submission(TextTask(id="1", prompt="p"), b"spz", named, MINER)):
            answer = await dendrite.call(axon, synapse, timeout=10)
            assert went(answer)[:2] == (401, 401)
    assert validator.submissions == []


# --- our validator's end, their miner


class OtherDendrite(bt.Dendrite):
    """bittensor's own, but for the constructor that asks the internet for its address."""

    def __init__(self, keypair: bt.Keypair) -> None:
        self.uuid, self.external_ip, self.keypair = "u", "192.0.2.1", keypair
        self.synapse_history: list[Any] = []
        self._session = None


async def test_another_miner_at_a_rehearsal(tmp_path: Path) -> None:
    pull_class, submit_class = today_s_shape()
    network = RehearsalNetwork(tmp_path, "http://127.0.0.1:9", 1, Limits(), ["a red cube"])
    await asyncio.to_thread(network.__enter__)
    try:
        keypair = bt.Wallet("rehearsal", "miner", str(tmp_path / "wallets")).hotkey
        (validator,) = network.validators
        axon = Neuron(1, validator.hotkey, "127.0.0.1", validator.port, 1e4, True).axon_info()
        async with OtherDendrite(keypair) as dendrite:
            pulled = await dendrite.call(axon, pull_class(), timeout=10, deserialize=False)
            assert pulled.is_success
            assert pulled.task.prompt == "a red cube"
            assert pulled.task.type == "text"
            ours = make_submission(TextTask(id=pulled.task.id, prompt="a red cube"), b"", validator.hotkey, keypair)
            theirs = submit_class(
                task_id=pulled.task.id, results="", submit_time=ours.submit_time, signature=ours.signature
            )
            answer = await dendrite.call(axon, theirs, timeout=10, deserialize=False)
        assert answer.is_success
        assert not answer.feedback.validation_failed
        assert answer.cooldown_until > time.time() + 200
    finally:
        await asyncio.to_thread(network.__exit__)
