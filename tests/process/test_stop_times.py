"""What a SIGTERM may take: each process' own time-outs, together, are less than stop_competitive.sh waits."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import bittensor as bt
import numpy as np
import pytest
from aiohttp import web

from common import ply
from generation import serve_competitive
from generation.web import app as api
from neurons.chain import Metagraph, Neuron
from neurons.miner import stopping
from neurons.miner.app import CompetitiveMiner
from neurons.miner.options import MinerOptions
from neurons.miner.validators.dendrite import ValidatorDendrite
from neurons.protocol import PullTask, TextTask
from scripts.ops.processes import STOP_S
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]
MINER = bt.Keypair.create_from_seed("0x" + "5a" * 32)  # type: ignore[arg-type]  # a str, whatever its stub says
VALIDATORS = [
    Neuron(uid, bt.Keypair.create_from_uri(f"//validator{uid}").ss58_address, "8.8.8.8", 9000 + uid, 1e4, True)
    for uid in (1, 2)
]
PLY = ply.write(ply.Vertices(ply.columns(0), np.ones((3, 17), dtype=np.float32)))


def test_the_script_waits_for_longer_than_a_stop_takes() -> None:
    assert stopping.WORKERS_S < stopping.TASKS_S <= stopping.WORKERS_S + stopping.SUBMISSIONS_S
    assert STOP_S["miner"] > stopping.TOTAL_S
    service = serve_competitive.GRACE_S + api.ENGINE_STOP_S + stopping.END_S
    assert service < STOP_S["generation_service"]
    text = (ROOT / "neurons/rehearsal/network.py").read_text()
    assert "self._thread.join(timeout=10)" in text
    assert STOP_S["rehearsal"] > 10
    assert f"({sum(STOP_S.values()):.0f} at most)" in (ROOT / "README.md").read_text()


class Network:
    """Hands out a task to each pull and never answers a submission. The second generation never ends."""

    def __init__(self) -> None:
        self.submissions = self.generations = 0

    async def call(self, _: Any, synapse: Any, timeout: float, deserialize: bool = False) -> Any:  # noqa: ASYNC109
        if isinstance(synapse, PullTask):
            synapse.task = TextTask(id=str(time.monotonic_ns()), prompt="p")
            synapse.axon = synapse.dendrite = bt.TerminalInfo(status_code=200)
            return synapse
        self.submissions += 1
        await asyncio.sleep(1e6)

    async def generate(self, _: web.Request) -> web.Response:
        self.generations += 1
        if self.generations == 2:
            await asyncio.sleep(1e6)
        return web.Response(body=PLY)

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})


async def test_a_stop_in_which_everything_hangs_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task in generation, a submission without an answer, and a ledger that somebody else has locked."""
    for name, seconds in (("WORKERS_S", 0.3), ("SUBMISSIONS_S", 0.3), ("TASKS_S", 0.5), ("LEDGER_S", 0.2)):
        monkeypatch.setattr(stopping, name, seconds)
    network = Network()
    app = web.Application()
    app.add_routes([web.get("/health", network.health), web.post("/generate/", network.generate)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()

    async def fetch(*_: object) -> Metagraph:
        return Metagraph(17, (*VALIDATORS, Neuron(9, MINER.ss58_address, "0.0.0.0", 0, 0.0, False)))

    monkeypatch.setattr("neurons.chain.fetch", fetch)
    monkeypatch.setattr(ValidatorDendrite, "call", network.call)
    monkeypatch.chdir(tmp_path)
    key = tmp_path / "cold" / "hotkeys" / "hot"
    key.parent.mkdir(parents=True)
    key.write_text(json.dumps({"secretSeed": "0x" + "5a" * 32}))
    ledger = tmp_path / "ledger.sqlite"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = MinerOptions(
        network="finney", wallet_name="cold", wallet_hotkey="hot", wallet_path=tmp_path,
        ledger=ledger, metrics_port=port, endpoints=(f"http://127.0.0.1:{runner.addresses[0][1]}",),
    )  # fmt: skip
    miner = CompetitiveMiner(options)
    running = asyncio.create_task(miner.run())
    await until(lambda: network.submissions >= 1 and network.generations >= 2, 20)
    lock = sqlite3.connect(ledger)
    lock.execute("BEGIN EXCLUSIVE")
    stopped_at = time.monotonic()
    miner.stop()
    assert await asyncio.wait_for(running, 20) == 0
    took = time.monotonic() - stopped_at
    assert 0.5 < took < 0.5 + 0.2 + stopping.METRICS_S + stopping.END_S
    lock.close()
    await runner.cleanup()
