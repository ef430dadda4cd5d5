"""The miner's dendrite against bittensor's own Axon, which decides which nonces it takes."""

# No `from __future__ import annotations` here: Axon.attach compares the annotations themselves.

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bittensor as bt
import pytest
import uvicorn
from bittensor.core import axon as axon_module

from neurons.chain import Neuron
from neurons.miner.validators import dendrite as dendrite_module
from neurons.miner.validators.clock import ValidatorClocks
from neurons.miner.validators.dendrite import ValidatorDendrite
from neurons.protocol import PULL_TIMEOUT_S, PullTask
from neurons.rehearsal.network import make_wallet

MINER = bt.Keypair.create_from_uri("//miner")


class Validator:
    """bittensor's Axon on loopback, with a clock that is `ahead` seconds ahead of this machine's."""

    def __init__(self, wallet: bt.Wallet, monkeypatch: pytest.MonkeyPatch, ahead: float = 0.0) -> None:
        self.asked: list[PullTask] = []
        server = socket.create_server(("127.0.0.1", 0))
        port = server.getsockname()[1]
        self.axon = bt.Axon(
            wallet=wallet, ip="127.0.0.1", port=port, external_ip="127.0.0.1", external_port=port, max_workers=1
        )
        self.axon.attach(forward_fn=self._pull_task)
        real_time, real_time_ns = time.time, time.time_ns
        clock = SimpleNamespace(
            time=lambda: real_time() + ahead,
            time_ns=lambda: real_time_ns() + int(ahead * 1e9),
            monotonic=time.monotonic,
            sleep=time.sleep,
        )
        monkeypatch.setattr(axon_module, "time", clock)
        monkeypatch.setattr(uvicorn.server, "time", clock)  # of the Date header
        serve = self.axon.fast_server.serve(sockets=[server])
        self._thread = threading.Thread(target=lambda: asyncio.run(serve), daemon=True)
        self._thread.start()
        while not self.axon.fast_server.started:
            time.sleep(0.005)
        self.address = Neuron(1, wallet.hotkey.ss58_address, "127.0.0.1", port, 1e4, True).axon_info()

    def stop(self) -> None:
        self.axon.fast_server.should_exit = True
        self._thread.join(10)

    def _pull_task(self, synapse: PullTask) -> PullTask:
        self.asked.append(synapse)
        return synapse


@pytest.fixture
def ahead() -> float:
    return 0.0


@pytest.fixture
def validator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float) -> Iterator[Validator]:
    validator = Validator(make_wallet(tmp_path, "validator"), monkeypatch, ahead)
    yield validator
    validator.stop()


class Miner:
    """One life of the miner's process, and how many requests it has sent."""

    def __init__(self) -> None:
        self.clocks = ValidatorClocks()
        self.dendrite = ValidatorDendrite(MINER)
        self.dendrite.on_date, self.dendrite.seconds_ahead = self.clocks.answered, self.clocks.highest_offset
        self.requests = 0
        post = self.dendrite._post

        async def count(*arguments: object) -> tuple[int, bytes]:
            self.requests += 1
            return await post(*arguments)  # type: ignore[arg-type]

        self.dendrite._post = count  # type: ignore[assignment, method-assign]

    async def pull(self, validator: Validator) -> int:
        """The status of the answer."""
        answer = await self.dendrite.call(validator.address, PullTask(), PULL_TIMEOUT_S)
        return int(answer.dendrite.status_code)  # type: ignore[union-attr, arg-type]

    async def close(self) -> None:
        await self.dendrite.aclose_session()


@pytest.fixture
async def miner():  # type: ignore[no-untyped-def]
    miner = Miner()
    yield miner
    await miner.close()


def set_clock(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """As the machine's clock is set while the process runs."""
    real_time, real_time_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: real_time() + by)
    monkeypatch.setattr(time, "time_ns", lambda: real_time_ns() + int(by * 1e9))


@pytest.mark.parametrize("by", [-3600.0, 3600.0])
async def test_a_clock_that_is_set_changes_nothing(
    validator: Validator, miner: Miner, monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    assert await miner.pull(validator) == 200
    set_clock(monkeypatch, by)
    assert await miner.pull(validator) == await miner.pull(validator) == 200
    assert miner.requests == 3
    nonces = [int(pull.dendrite.nonce) for pull in validator.asked]  # type: ignore[union-attr, arg-type]
    assert nonces == sorted(set(nonces))
    assert nonces[2] - nonces[0] < 60e9
    assert len({pull.dendrite.uuid for pull in validator.asked}) == 1  # type: ignore[union-attr]


async def test_a_clock_that_stands_still_is_no_reason_for_a_refusal(
    validator: Validator, miner: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = time.time_ns()
    monkeypatch.setattr(dendrite_module, "steady_time_ns", lambda: stopped)
    assert await miner.pull(validator) == await miner.pull(validator) == 200
    assert miner.requests == 2


async def test_an_idle_connection_is_given_up_before_the_axon_closes_it(validator: Validator, miner: Miner) -> None:
    """A call on one that is just being closed would be lost."""
    connector: Any = (await miner.dendrite.session).connector
    assert connector._keepalive_timeout < validator.axon.fast_server.config.timeout_keep_alive


async def test_a_process_that_starts_after_the_clock_was_set_back(
    validator: Validator, miner: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await miner.pull(validator) == 200
    monkeypatch.setattr(dendrite_module, "steady_time_ns", lambda: time.time_ns() - 10 * 10**9)
    later = Miner()
    assert await later.pull(validator) == await later.pull(validator) == 200
    assert later.requests == 2
    await later.close()


async def test_nonces_that_are_overtaken_get_through_as_somebody_new(validator: Validator, miner: Miner) -> None:
    """A 401 after many a good answer, as when this miner's key and uuid were seen with a nonce from the future."""
    assert await miner.pull(validator) == 200
    (key,) = validator.axon.nonces
    validator.axon.nonces[key] += 3600 * 10**9
    assert await miner.pull(validator) == 200
    assert miner.requests == 3
    assert await miner.pull(validator) == 200
    assert miner.requests == 4
    assert len({pull.dendrite.uuid for pull in validator.asked}) == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("ahead", [15.0, 18.0, 50.0, 3600.0, 864_000.0, -3600.0])
async def test_a_validator_whose_clock_is_ahead_is_asked_all_the_same(
    validator: Validator, miner: Miner, ahead: float
) -> None:
    assert await miner.pull(validator) == 200
    assert miner.requests == (2 if ahead > 16 else 1)
    for _ in range(3):
        assert await miner.pull(validator) == 200
    declared = [pull.timeout for pull in validator.asked]
    assert declared[0] == (PULL_TIMEOUT_S if ahead < 16 else pytest.approx(60 + ahead, abs=4))
    assert declared[1:] == [PULL_TIMEOUT_S] * 3  # once it knows a nonce of ours, how old they are does not matter
    assert len(validator.asked) == 4


@pytest.mark.parametrize("ahead", [50.0])
async def test_without_a_date_60_seconds_are_declared(validator: Validator, miner: Miner) -> None:
    miner.dendrite.on_date = lambda *_: None
    assert await miner.pull(validator) == 200
    assert validator.asked[0].timeout == pytest.approx(60 + 5, abs=1)


async def test_one_that_refuses_for_ever_is_not_asked_twice_for_ever(validator: Validator, miner: Miner) -> None:
    async def refuse(_: bt.Synapse) -> None:
        raise RuntimeError("nobody is welcome")

    validator.axon.verify_fns["PullTask"] = refuse  # type: ignore[assignment]
    for requests in (2, 3, 4):
        assert await miner.pull(validator) == 401
        assert miner.requests == requests
    validator.axon.verify_fns["PullTask"] = validator.axon.default_verify
    assert await miner.pull(validator) == 200
    assert miner.requests == 5


async def test_what_one_validator_refuses_is_no_business_of_the_others(
    validator: Validator, miner: Miner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Validator(make_wallet(tmp_path, "other"), monkeypatch)
    try:
        assert await miner.pull(validator) == await miner.pull(other) == 200
        (key,) = validator.axon.nonces
        validator.axon.nonces[key] += 3600 * 10**9
        assert await miner.pull(validator) == await miner.pull(other) == 200
        assert len(other.axon.nonces) == 1
        assert len(validator.axon.nonces) == 2
    finally:
        other.stop()


async def test_nobody_is_asked_for_this_machine_s_address(
    validator: Validator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bittensor's own dendrite asks the internet for it, and calls an axon that has it at 0.0.0.0."""

    def offline() -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("bittensor.utils.networking.get_external_ip", offline)
    miner = Miner()
    miner.dendrite.external_ip = validator.address.ip
    assert miner.dendrite._get_endpoint_url(validator.address, "PullTask").startswith("http://127.0.0.1:")
    assert await miner.pull(validator) == 200
    await miner.close()
