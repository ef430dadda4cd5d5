"""The whole miner against a rehearsal: real axons, the real dendrite, and a generation service made in place."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest

from common import spz
from neurons import chain
from neurons.chain import Metagraph, MetagraphUnavailable, Neuron
from neurons.miner.app import CompetitiveMiner
from neurons.miner.options import MinerOptions
from neurons.miner.submission.spool import LOCK_NAME, hold
from neurons.miner.validators.dendrite import ValidatorDendrite
from neurons.protocol import PullTask, SubmitResults, TextTask, make_submission
from neurons.rehearsal.network import RehearsalNetwork, make_wallet
from tests.support.miner_harness import LIMITS, PROMPTS, ROOT, StandInService, accepted, options, start_network
from tests.support.waiting import until


@pytest.fixture
async def service() -> AsyncIterator[StandInService]:
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("neurons"):  # bittensor's import sets the loggers that exist to CRITICAL
            logging.getLogger(name).setLevel(logging.NOTSET)
    async with StandInService() as service:
        yield service


async def test_a_rehearsal_beside_another_gives_way_and_comes_back(tmp_path: Path) -> None:
    first, later = [RehearsalNetwork(tmp_path, "http://127.0.0.1:9", count, LIMITS, PROMPTS) for count in (1, 2)]

    def told() -> list[int]:
        return [neuron.uid for neuron in chain.load(tmp_path / "network.json").neurons if neuron.serving]

    await asyncio.to_thread(first.__enter__)
    try:
        assert told() == [1]
        await asyncio.to_thread(later.__enter__)
        first.announce()
        assert told() == [1, 180]
        await asyncio.to_thread(later.__exit__)
        first.announce()
        assert told() == [1]
    finally:
        await asyncio.to_thread(first.__exit__)
    assert not (tmp_path / "network.json").exists()


@pytest.mark.slow
async def test_from_pull_to_accepted(service: StandInService, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neurons")
    settings = options(tmp_path, service.endpoint)
    miner = CompetitiveMiner(settings)
    running = asyncio.create_task(miner.run())
    await asyncio.sleep(0.2)  # the miner comes first and has to wait for the rehearsal
    assert "waiting for the rehearsal" in settings.status_file.read_text()  # type: ignore[union-attr]

    network = await start_network(tmp_path, service.endpoint)
    try:
        first, second, unrewarding = network.validators
        await until(lambda: accepted(first) >= 2 and accepted(second) >= 2)
        status = json.loads(settings.status_file.read_text())  # type: ignore[union-attr]
        assert (status["status"], status["validators"], status["network"]) == ("ready", 2, "rehearsal")
        miner.stop()
        assert await asyncio.wait_for(running, 25) == 0
    finally:
        await asyncio.to_thread(network.__exit__)

    assert unrewarding.uid == 180
    assert unrewarding.pulls == 0
    for validator in (first, second):
        assert [state.violations for state in validator.rules.miners.values()] == [0]
    assert set(service.prompts) <= set(PROMPTS)
    assert service.scored >= 4
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [LOCK_NAME]
    assert not settings.status_file.exists()  # type: ignore[union-attr]
    lines = [record.getMessage() for record in caplog.records]
    for expected in (
        "No available validators: waiting for the rehearsal",
        "nothing is submitted to the Bittensor network",
        "Validator [180] skipped: blacklisted UID",
        "Task pulled from validator [1]",
        "CLIP Score: 0.76",
        "Task submitted to validator [2]",
        "Feedback from [1]: Score=0.81, Reward=",
    ):
        assert any(expected in line for line in lines), expected


async def test_a_spool_has_one_miner(service: StandInService, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = await start_network(tmp_path, service.endpoint, validators=1)
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "half.tmp").touch()
    try:
        (tmp_path / "link").symlink_to(tmp_path / "spool")
        with hold(tmp_path / "link"):
            miner = CompetitiveMiner(options(tmp_path, service.endpoint))
            assert await asyncio.wait_for(miner.run(), 10) == 1
        assert (tmp_path / "spool" / "half.tmp").exists()
        assert network.validators[0].pulls == 0
        (problem,) = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
        assert problem.startswith(f"Spool {tmp_path / 'spool'} is in use by another miner")
        miner = CompetitiveMiner(options(tmp_path, service.endpoint))
        running = asyncio.create_task(miner.run())
        await until(lambda: network.validators[0].pulls > 0)
        miner.stop()
        assert await asyncio.wait_for(running, 25) == 0
    finally:
        await asyncio.to_thread(network.__exit__)


async def test_each_hotkey_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unreachable(network: str, netuid: int) -> Metagraph:
        raise MetagraphUnavailable("nobody there")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("neurons.chain.fetch", unreachable)
    hotkeys = [make_wallet(tmp_path / "wallets", name).hotkey.ss58_address for name in ("a", "b")]
    miners = [
        CompetitiveMiner(
            MinerOptions(
                network="ws://[::1]:9944",
                wallet_name="rehearsal",
                wallet_hotkey=name,
                wallet_path=tmp_path / "wallets",
                metrics_port=0,
            )
        )
        for name in ("a", "b")
    ]
    running = [asyncio.create_task(miner.run()) for miner in miners]
    locks = {Path(f"data/ws-1-9944-17-{hotkey}/spool/{LOCK_NAME}") for hotkey in hotkeys}
    await until(lambda: set(Path("data").glob("*/*/*")) == locks)
    for miner in miners:
        miner.stop()
    assert await asyncio.gather(*running) == [0, 0]


async def test_a_low_score_costs_the_penalty(service: StandInService, tmp_path: Path) -> None:
    service.score = 0.2
    network = await start_network(tmp_path, service.endpoint, validators=1)
    miner = CompetitiveMiner(options(tmp_path, service.endpoint))
    running = asyncio.create_task(miner.run())
    try:
        (validator,) = network.validators
        state = validator.rules.miners[network.miner_hotkey]
        await until(lambda: state.cooldown_until > 0)
        assert accepted(validator) == 0
        assert state.cooldown_until >= time.time() + LIMITS.failure_penalty - 1
        miner.stop()
        assert await asyncio.wait_for(running, 25) == 0
    finally:
        await asyncio.to_thread(network.__exit__)


async def test_validators_check_senders_signatures_and_tasks(service: StandInService, tmp_path: Path) -> None:
    network = await start_network(tmp_path, service.endpoint, validators=1)
    keypair = bt.Wallet("rehearsal", "miner", str(tmp_path / "rehearsal" / "wallets")).hotkey
    stranger = bt.Keypair.create_from_uri("//stranger")
    (validator,) = network.validators
    axon = Neuron(1, validator.hotkey, "127.0.0.1", validator.port, 1e4, True).axon_info()

    async def call(sender: bt.Keypair, synapse: Any) -> Any:
        async with ValidatorDendrite(sender) as dendrite:
            return await dendrite.call(axon, synapse, timeout=10, deserialize=False)

    try:
        refused = await call(stranger, PullTask())
        assert refused.task is None
        assert refused.cooldown_until > 0
        task = (await call(keypair, PullTask())).task
        assert task is not None
        assert (await call(keypair, PullTask())).task == task

        result = spz.compress(service.splat)
        by_stranger = await call(stranger, make_submission(task, result, validator.hotkey, stranger))
        assert by_stranger.axon.status_code == 403

        other = make_submission(TextTask(id="other", prompt=task.prompt), result, validator.hotkey, keypair)
        other.cooldown_until = 5
        answer = await call(keypair, other)
        assert answer.is_success
        assert answer.feedback is not None
        assert answer.cooldown_until == 0

        forged: SubmitResults = make_submission(task, result, validator.hotkey, keypair)
        forged.submit_time += 1
        answer = await call(keypair, forged)
        assert answer.is_success
        assert not answer.feedback.validation_failed
        assert answer.feedback.task_fidelity_score == 0
        assert answer.cooldown_until > time.time() + 7
        assert service.scored == 0

        late = await call(keypair, make_submission(task, result, validator.hotkey, keypair))
        assert late.axon.status_code == 403
        assert validator.rules.miners[network.miner_hotkey].task is None
    finally:
        await asyncio.to_thread(network.__exit__)


@pytest.mark.slow
async def test_the_two_processes(service: StandInService, tmp_path: Path) -> None:
    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdin=subprocess.DEVNULL)

    state, status = tmp_path / "state", tmp_path / "miner.status"
    rehearsal = start(
        *("neurons.rehearsal", "--validators", "2", "--time-scale", "100", "--state", str(state)),
        *("--endpoint", service.endpoint, "--logging.file", str(tmp_path / "rehearsal.log")),
    )
    miner = start(
        *("neurons.serve_miner_competitive", "--network", "rehearsal", "--rehearsal.state", str(state)),
        *("--generation.endpoint", service.endpoint, "--spool", str(tmp_path / "spool")),
        *("--ledger", str(tmp_path / "ledger.sqlite"), "--metrics-port", "0"),
        *("--logging.file", str(tmp_path / "miner.log"), "--status-file", str(status)),
    )
    try:
        await until(lambda: status.exists() and '"status": "ready"' in status.read_text(), 60)
        await until(lambda: "Feedback from [1]: Score=0.81" in (tmp_path / "miner.log").read_text(), 60)
        for process in (miner, rehearsal):
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 30) == 0
    finally:
        for process in (miner, rehearsal):
            process.kill()
            process.wait()
    assert not status.exists()
    assert not (state / "network.json").exists()
    for log_file in ("miner.log", "rehearsal.log"):
        assert "Traceback" not in (tmp_path / log_file).read_text()
    assert "accepted: 'a " in (tmp_path / "rehearsal.log").read_text()
