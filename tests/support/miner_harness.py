"""The whole miner around a generation service made in place, for tests of several parts at once."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import numpy as np
from aiohttp import web

from common import ply, spz
from neurons.miner.options import MinerOptions
from neurons.rehearsal.network import RehearsalNetwork, load_prompts
from neurons.rehearsal.rules import Limits
from neurons.rehearsal.validator import RehearsalValidator

ROOT = Path(__file__).parents[2]
# A task every 2 to 3 s from each validator.
LIMITS = Limits().compressed(100)
PROMPTS = load_prompts()


def make_splat(count: int = 7_000) -> bytes:
    names = ply.columns(0)
    return ply.write(ply.Vertices(names, np.random.default_rng(0).normal(size=(count, len(names))).astype(np.float32)))


class StandInService:
    """Answers as the generation service does; `status` and `score` can be changed while it runs."""

    def __init__(self) -> None:
        self.status = "ready"
        self.score = 0.81
        self.splat = make_splat()
        self.prompts: list[str] = []
        self.scored = 0

    async def __aenter__(self) -> StandInService:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self._health)
        app.router.add_post("/generate/", self._generate)
        app.router.add_post("/validate_txt_to_3d_ply/", self._validate)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.endpoint = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": self.status})

    async def _generate(self, request: web.Request) -> web.Response:
        self.prompts.append(str((await request.post())["prompt"]))
        return web.Response(body=self.splat, headers={"X-Score": "0.76", "X-Seed": "7"})

    async def _validate(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["prompt"] in PROMPTS
        assert body["compression"] == 2
        vertices = ply.read(spz.decompress(base64.b64decode(body["data"])))
        assert len(vertices.table) == 7_000
        self.scored += 1
        return web.json_response({"score": self.score, "alignment_score": 0.8, "iqa": 0.7, "ssim": 0.9, "lpips": 0.1})


def options(tmp_path: Path, endpoint: str) -> MinerOptions:
    state = tmp_path / "rehearsal"
    return MinerOptions(
        network="rehearsal",
        wallet_name="rehearsal",
        wallet_hotkey="miner",
        wallet_path=state / "wallets",
        endpoints=(endpoint,),
        spool=tmp_path / "spool",
        ledger=tmp_path / "ledger.sqlite",
        metrics_port=0,
        rehearsal_state=state,
        status_file=tmp_path / "run" / "miner.status",
    )


async def start_network(tmp_path: Path, endpoint: str, validators: int = 3) -> RehearsalNetwork:
    network = RehearsalNetwork(tmp_path / "rehearsal", endpoint, validators, LIMITS, PROMPTS)
    return await asyncio.to_thread(network.__enter__)


def accepted(validator: RehearsalValidator) -> int:
    return sum(len(miner.accepted) for miner in validator.rules.miners.values())
