"""The rehearsal answers as the public validator's code does: transcripts of that code are played to it.

tests/golden/validator_rules.json has scenarios in virtual time, each a list of calls with what was answered and with
what the validator then knew of the miner; validator_axon.json has what its axon does before a handler is asked.
"""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import bittensor as bt
import pytest
from bittensor.core.settings import version_as_int

from neurons.miner.records import verdicts
from neurons.protocol import PullTask, SubmitResults, Task, signed_message
from neurons.rehearsal.network import make_wallet
from neurons.rehearsal.rules import Limits, Rules
from neurons.rehearsal.validator import RehearsalValidator
from tests.support.waiting import until

GOLDEN = Path(__file__).parents[1] / "golden"
RULES: dict[str, list[dict[str, Any]]] = {
    name: steps for name, steps in json.loads((GOLDEN / "validator_rules.json").read_text()).items() if name != "source"
}
AXON: dict[str, Any] = json.loads((GOLDEN / "validator_axon.json").read_text())
KEYS = {name: bt.Keypair.create_from_uri(f"//{name}") for name in ("miner", "stranger", "other")}
MINER = KEYS["miner"].ss58_address
# What the public code makes of these is no answer: its transcripts say so, and a stand-in for the service does not.
NO_SCORE = {"500", "422", "404", "time-out", "no connection", "connection dropped", "no json", "no score"}
PICTURE = b"\x89PNG"


@dataclass
class World:
    """A rehearsal validator by a virtual clock, with the names that a transcript has for tasks."""

    folder: Path
    prompts: Iterator[str | bytes]
    known_from: float
    now: float = 1_000_000.25
    names: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    scoring: dict[int, asyncio.Future[float | None]] = field(default_factory=dict)
    scored: list[Task] = field(default_factory=list)
    saved: str | None = None

    def __post_init__(self) -> None:
        self.rules = Rules(Limits(), [MINER], self.prompts, lambda: self.now, self.known_from)
        self.validator = RehearsalValidator(1, make_wallet(self.folder, "validator"), self.rules, self)
        self.next_score: asyncio.Future[float | None] | float | None = None

    async def score(self, task: Task, results: str) -> float | None:
        assert results == "c3BsYXQ="
        self.scored.append(task)
        answer = self.next_score
        return await answer if isinstance(answer, asyncio.Future) else answer

    def name(self, task: Task) -> str:
        name = self.names.setdefault(task.id, f"task {len(self.names) + 1}")
        self.tasks[name] = task
        return name

    def known(self) -> dict[str, Any]:
        miner = self.rules.miners[MINER]
        return {
            "task": None if miner.task is None else self.name(miner.task),
            "cooldown_until": miner.cooldown_until,
            "violations": miner.violations,
            "locked_until": miner.locked_until,
        }

    async def pull(self, by: str = "miner") -> dict[str, Any]:
        synapse = PullTask(dendrite=bt.TerminalInfo(hotkey=KEYS[by].ss58_address))
        answer = await self.validator._pull_task(synapse)
        return {
            "status": 200,
            "task": None if answer.task is None else self.name(answer.task),
            "type": None if answer.task is None else answer.task.type,
            **{name: getattr(answer, name) for name in ("validation_threshold", "throttle_period")},
            **{name: getattr(answer, name) for name in ("cooldown_until", "cooldown_violations")},
        }

    async def submit(
        self, task: str, by: str = "miner", results: str = "splat", signature: str = "good"
    ) -> dict[str, Any]:
        """As the axon does it: first the blacklist, then the handler, whose exception is a 500."""
        synapse = make_signed(self.tasks.get(task), KEYS[by], self.validator.hotkey, results, signature)
        if self.validator._refuse_submission(synapse)[0]:
            return {"status": 403}
        try:
            answer = await self.validator._submit_results(synapse)
        except ValueError:
            return {"status": 500}
        assert answer.feedback is not None
        assert answer.results == answer.signature == ""
        return {"status": 200, "feedback": answer.feedback.model_dump(), "cooldown_until": answer.cooldown_until}


def make_signed(
    task: Task | None, keypair: bt.Keypair, validator: str, results: str = "splat", signature: str = "good"
) -> SubmitResults:
    when = 5
    message = signed_message(when, "nothing" if task is None else task.prompt, validator, keypair.ss58_address)
    signer = KEYS["other"] if signature == "of another key" else keypair
    odd = {"too short": base64.b64encode(b"abc").decode(), "empty": "", "not base64": "=?=?"}
    return SubmitResults(
        dendrite=bt.TerminalInfo(hotkey=keypair.ss58_address),
        task_id=str(uuid.uuid4()) if task is None else task.id,
        results={"splat": "c3BsYXQ=", "empty": ""}[results],
        submit_time=when + (signature == "of another time"),
        signature=odd.get(signature, base64.b64encode(signer.sign(message)).decode()),
    )


async def settle() -> None:
    """Until everything that can run has run: the rules need no thread and no time."""
    for _ in range(20):
        await asyncio.sleep(0)


def expected_score(step: dict[str, Any]) -> float | None:
    scoring = step.get("scoring")
    return None if scoring is None or scoring in NO_SCORE else float(scoring)


async def play(world: World, steps: list[dict[str, Any]]) -> None:
    events = [(step["at"], float(index), step, False) for index, step in enumerate(steps)]
    events += [(step["scored_at"], index + 0.5, step, True) for index, step in enumerate(steps) if "scored_at" in step]
    running: dict[int, asyncio.Task[dict[str, Any]]] = {}
    for at, index, step, is_end in sorted(events, key=lambda event: event[:2]):
        world.now = at
        call = step["call"]
        arguments = {name: step[name] for name in ("task", "by", "results", "signature") if name in step}
        answer: dict[str, Any] | None = None
        if is_end:
            world.scoring[int(index)].set_result(expected_score(step))
            answer = await running.pop(int(index))
        elif call == "pull":
            for _ in range(step.get("times", 1)):
                answer = await world.pull(**arguments)
        elif call == "submit" and "scored_at" in step:
            world.next_score = world.scoring[int(index)] = asyncio.get_running_loop().create_future()
            running[int(index)] = asyncio.create_task(world.submit(**arguments))
            await settle()
            continue
        elif call == "submit":
            world.next_score = expected_score(step)
            before = len(world.scored)
            answer = await world.submit(**arguments)
            assert (len(world.scored) > before) == step["scored"], step
        elif call == "save":
            world.saved = world.rules.saved()
        elif call == "crash":
            world.rules.restore(world.saved if step["state_file"] == "old" else None)
        elif call == "sync":
            world.rules._known_from = at
        if answer is not None:
            wanted = step["answer"]
            if "feedback" in wanted:
                wanted["feedback"] = pytest.approx(wanted["feedback"])
            assert answer == wanted, step
        assert world.known() == step["state"], step


@pytest.mark.parametrize("name", RULES)
async def test_as_the_public_validator(name: str, tmp_path: Path) -> None:
    prompts: Iterator[str | bytes] = iter([PICTURE] * 100 if "image" in name else ["a red cube"] * 100)
    world = World(tmp_path, prompts, float("inf") if "unregistered" in name else 0.0)
    await play(world, RULES[name])


def test_the_miner_reckons_with_the_limits_that_the_transcripts_have() -> None:
    limits = Limits()  # the ones of `test_as_the_public_validator`
    assert (limits.task_cooldown, limits.validation_lock) == (verdicts.TASK_COOLDOWN_S, verdicts.LOCK_S)
    assert limits.window == verdicts.WINDOW_S


# --- what the axon does before a handler is asked


@asynccontextmanager
async def served(world: World) -> AsyncIterator[RehearsalValidator]:
    serving = asyncio.create_task(world.validator.serve())
    await until(lambda: world.validator.started)
    try:
        yield world.validator
    finally:
        world.validator.stop()
        await serving


class Wire:
    """Sends a synapse as a dendrite does, with every field of its header in the test's hand."""

    def __init__(self, world: World, session: aiohttp.ClientSession) -> None:
        self.world = world
        self.session = session
        self.uuids = {name: str(uuid.uuid4()) for name in "abcdefgh"}
        self.nonce = 0

    async def call(
        self,
        synapse: bt.Synapse,
        by: str = "miner",
        *,
        nonce: int | None = None,
        uuid: str = "h",
        seconds: float = 12.0,
        forge: bool = False,
        without: str = "",
    ) -> tuple[int, dict[str, Any]]:
        validator, keypair = self.world.validator, KEYS[by]
        self.nonce = max(self.nonce + 1, int(self.world.now * 1e9))
        sent = self.nonce if nonce is None else nonce
        synapse.timeout = seconds
        synapse.dendrite = bt.TerminalInfo(
            ip="127.0.0.1", version=version_as_int, nonce=sent, uuid=self.uuids[uuid], hotkey=keypair.ss58_address
        )
        synapse.axon = bt.TerminalInfo(ip="127.0.0.1", port=validator.port, hotkey=validator.hotkey)
        message = f"{sent}.{keypair.ss58_address}.{validator.hotkey}.{self.uuids[uuid]}.{synapse.body_hash}"
        synapse.dendrite.signature = "0x" + (KEYS["other"] if forge else keypair).sign(message).hex()
        headers = {k: v for k, v in synapse.to_headers().items() if not (without and k.endswith(without))}
        url = f"http://127.0.0.1:{validator.port}/{type(synapse).__name__}"
        async with self.session.post(url, headers=headers, json=synapse.model_dump()) as response:
            return response.status, await response.json()


@asynccontextmanager
async def wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Wire]:
    world = World(tmp_path, iter(["a red cube"] * 100), 0.0)
    monkeypatch.setattr("bittensor.core.axon.time.time_ns", lambda: int(world.now * 1e9))
    async with served(world), aiohttp.ClientSession() as session:
        yield Wire(world, session)


async def test_nonces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with wired(tmp_path, monkeypatch) as wire:
        for step in AXON["nonces"]:
            wire.world.now = step["at"]
            nonce = int((step["at"] + step["nonce"]) * 1e9)
            status, body = await wire.call(
                PullTask(),
                step["by"],
                nonce=nonce,
                uuid=step["uuid"],
                seconds=step["timeout"],
                forge=step.get("forge", False),
            )
            assert status == step["status"], step
            assert str(body.get("message", "")).startswith(step.get("message", "")), step


async def test_what_an_axon_does_not_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoSuchSynapse(bt.Synapse):
        pass

    async with wired(tmp_path, monkeypatch) as wire:
        wire.world.next_score = 0.8
        validator = wire.world.validator
        assert (await wire.call(make_signed(None, KEYS["miner"], validator.hotkey)))[0] == 403  # nothing assigned
        await wire.call(PullTask())
        task = wire.world.rules.miners[MINER].task
        assert task is not None
        for name in ("results", "submit_time", "signature"):
            submission = make_signed(task, KEYS["miner"], validator.hotkey)
            status, _ = await wire.call(submission, without=f"_{name}")
            assert status == AXON["statuses"][f"no header of {name}"]
        assert (await wire.call(NoSuchSynapse()))[0] == AXON["statuses"]["unknown route"]
        assert (await wire.call(make_signed(task, KEYS["stranger"], validator.hotkey), "stranger"))[0] == 403
        # Refused before the nonce is looked at, which is therefore not used up.
        submission = make_signed(task, KEYS["miner"], validator.hotkey)
        status, body = await wire.call(submission)
        assert (status, body["feedback"]["task_fidelity_score"]) == (200, 0.8)
        repeated = [await wire.call(make_signed(task, KEYS["miner"], validator.hotkey)) for _ in range(2)]
        assert [status for status, _ in repeated] == [403, 403]
        assert not wire.world.scored[1:]


async def test_scoring_goes_on_when_the_client_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with wired(tmp_path, monkeypatch) as wire:
        world = wire.world
        await wire.call(PullTask())
        task = world.rules.miners[MINER].task
        held: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        world.next_score = held
        sending = asyncio.create_task(wire.call(make_signed(task, KEYS["miner"], world.validator.hotkey)))
        await until(lambda: world.scored, 10)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await asyncio.sleep(0.1)
        world.now += 5
        held.set_result(0.8)
        await until(lambda: world.rules.miners[MINER].task is None, 10)
        assert world.known() == AXON["disconnect"]["state"]
        status, _ = await wire.call(make_signed(task, KEYS["miner"], world.validator.hotkey))
        assert {"status": status} == AXON["disconnect"]["the same again"]
        _, body = await wire.call(PullTask())
        assert body["cooldown_violations"] == AXON["disconnect"]["pull"]["cooldown_violations"]
