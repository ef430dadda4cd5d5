"""Validators that move, leave, return, or are not eligible any more."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from neurons.chain import Metagraph
from neurons.miner.status import IdleLog, snapshot
from neurons.protocol import PULL_TIMEOUT_S
from scripts.bench.simulated_subnet import (
    MINER,
    Behaviour,
    StandInService,
)
from scripts.bench.virtual_time import now
from tests.support.mining import HOUR, Network, in_virtual_time, limits, mining, violations
from tests.support.waiting import until


def test_a_validator_that_moved_is_asked_and_answered_at_its_new_address(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network([Behaviour(), Behaviour()], limits())
        async with mining(network, tmp_path) as miner:
            await asyncio.sleep(5)
            # Both validators move while their tasks are in work: what was the one's is the other's address now.
            first, second = network.validators
            network.validators.reverse()
            first.neuron, second.neuron = (
                replace(first.neuron, port=second.neuron.port),
                replace(second.neuron, port=first.neuron.port),
            )
            miner.directory.update(network.metagraph())
            miner.manager.sync()
            await asyncio.sleep(60)
            assert first.accepted == second.accepted == 1
            assert len(network.submitted) == 2

    in_virtual_time(test)


@pytest.mark.parametrize("after", [1.0, PULL_TIMEOUT_S + 60])
def test_a_dead_validator_that_moves_is_asked_at_once(tmp_path: Path, after: float) -> None:
    """Or when the pull that is under way to its old address has failed."""

    async def test() -> None:
        network = Network([Behaviour(dead=True)], limits())
        async with mining(network, tmp_path) as miner:
            await asyncio.sleep(HOUR)
            calls = len(network.calls)
            await until(lambda: len(network.calls) > calls, HOUR, every=1.0)
            await asyncio.sleep(after)
            neuron = replace(network.validators[0].neuron, ip="127.0.0.2")
            before = len(network.calls)
            miner.directory.update(Metagraph(17, (neuron,)))
            miner.manager.sync()
            await asyncio.sleep(1 if after > PULL_TIMEOUT_S else PULL_TIMEOUT_S)
            assert len(network.calls) == before + 1

    in_virtual_time(test)


@pytest.mark.parametrize("how", ["leaves", "loses stake", "blacklisted"])
def test_one_that_is_not_eligible_any_more_gets_its_result_and_is_left_alone(tmp_path: Path, how: str) -> None:
    async def test() -> None:
        network = Network([Behaviour(), Behaviour()], limits())
        async with mining(network, tmp_path) as miner:
            await asyncio.sleep(5)
            gone, stays = network.validators
            if how == "blacklisted":
                miner.blacklist_file.write_text(gone.hotkey)
                miner.blacklist.reload()
                miner.directory.refresh()
            else:
                poor = () if how == "leaves" else (replace(gone.neuron, stake=10.0),)
                miner.directory.update(Metagraph(17, (stays.neuron, *poor)))
            miner.manager.sync()
            await asyncio.sleep(HOUR)
            assert gone.accepted == 1
            assert stays.accepted >= 11
            pulls = Counter(port for name, port, _ in network.calls if name == "PullTask")
            assert pulls[gone.neuron.port] == 1
            # It comes back within its cooldown.
            gone.rules.miners[MINER.ss58_address].cooldown_until = gone.clock() + 200
            miner.blacklist_file.write_text("")
            miner.blacklist.reload()
            miner.directory.update(network.metagraph())
            miner.manager.sync()
            await asyncio.sleep(600)
            assert gone.accepted >= 2

    in_virtual_time(test)


def test_coming_and_going_is_no_way_around_a_cooldown(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network([Behaviour()], limits())
        async with mining(network, tmp_path) as miner:
            for _ in range(100):
                await asyncio.sleep(30)
                miner.directory.update(Metagraph(17, ()))
                miner.manager.sync()
                await asyncio.sleep(1)
                miner.directory.update(network.metagraph())
                miner.manager.sync()
            assert violations(network) == 0
            assert network.validators[0].accepted >= 9

    in_virtual_time(test)


def test_a_silent_validator_that_leaves_and_returns_is_asked_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network([Behaviour()], limits())
        network.down = True
        async with mining(network, tmp_path) as miner:
            await asyncio.sleep(HOUR)
            await until(lambda: miner.manager.silent == 1, HOUR, every=1.0)
            miner.directory.update(Metagraph(17, ()))
            miner.manager.sync()
            await asyncio.sleep(1)
            assert miner.manager.silent == 0
            network.down, before = False, len(network.calls)
            miner.directory.update(network.metagraph())
            miner.manager.sync()
            await asyncio.sleep(1)
            assert len(network.calls) == before + 1

    in_virtual_time(test)


@pytest.mark.parametrize("doing", ["waits out a cooldown", "is left alone", "ends"])
def test_a_validator_that_leaves_and_returns_at_once_keeps_its_poller(tmp_path: Path, doing: str) -> None:
    """Within one turn of the event loop, and no synchronisation comes to the rescue for an hour."""

    async def test() -> None:
        network = Network([Behaviour()], limits())
        service = StandInService(20.0, 4)
        async with mining(network, tmp_path, service) as miner:
            (validator,) = network.validators
            await asyncio.sleep(100)
            if doing == "is left alone":
                network.down = True
                await asyncio.sleep(HOUR)
                network.down = False
                assert miner.manager.silent == 1
            before = validator.accepted
            if doing == "ends":
                miner.pool.ready.clear()
                await asyncio.sleep(300)  # the cooldown is over, and nobody can generate
            miner.directory.update(Metagraph(17, ()))
            miner.manager.sync()
            if doing == "ends":
                miner.pool.ready.set()
                await asyncio.sleep(0)
            miner.directory.update(network.metagraph())
            miner.manager.sync()
            await asyncio.sleep(HOUR)
            assert validator.accepted - before >= 11
        assert violations(network) == 0

    in_virtual_time(test)


def test_a_validator_with_a_new_hotkey_is_shown_under_it(tmp_path: Path) -> None:
    async def test() -> None:
        network = Network([Behaviour()], limits())
        async with mining(network, tmp_path) as miner:
            await asyncio.sleep(100)
            before = network.validators[0].neuron
            for hotkey in (before.hotkey, "another"):
                miner.directory.update(Metagraph(17, (replace(before, hotkey=hotkey),)))
                miner.manager.sync()
                shown = snapshot(miner.directory, miner.manager, miner.pool, miner.clocks, 0, "ready")
                assert shown.hotkeys == {before.uid: hotkey}
                assert bool(shown.cooldowns) == (hotkey == before.hotkey)

    in_virtual_time(test)


def test_it_is_said_when_nobody_is_left_to_ask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neurons.miner.status")

    async def test() -> None:
        network = Network([Behaviour(), Behaviour(), Behaviour(dead=True)], limits())
        async with mining(network, tmp_path) as miner:
            idle_log = IdleLog(now)
            for _ in range(60):
                await asyncio.sleep(1)
                idle_log.update(miner.manager, len(miner.directory.eligible))
        lines = [record.getMessage() for record in caplog.records if record.name == "neurons.miner.status"]
        assert len(lines) == 1
        assert lines[0].startswith("No available validators: 2 on cooldown")
        assert "1 not answering" in lines[0]

    in_virtual_time(test)


def test_validators_that_are_all_silent_have_no_next_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neurons.miner.status")

    async def test() -> None:
        network = Network([Behaviour(dead=True)], limits())
        async with mining(network, tmp_path) as miner:
            idle_log = IdleLog(now)
            for _ in range(40):
                await asyncio.sleep(1)
                idle_log.update(miner.manager, len(miner.directory.eligible))
        assert "No available validators: 1 not answering" in [record.getMessage() for record in caplog.records]

    in_virtual_time(test)
