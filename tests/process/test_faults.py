"""What becomes of tasks when the miner is killed, its service goes, its disk is full or its network is gone.

The miner is a process of its own; validators and service are here, and write down all that happens. Times are
compressed 300 times: a task a second or two from each validator.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from neurons import chain
from neurons.miner.submission.spool import LOCK_NAME
from neurons.protocol import Task
from neurons.rehearsal.network import RehearsalNetwork
from neurons.rehearsal.rules import Judgement, Limits, PullAnswer, Rules
from tests.support.miner_harness import ROOT, StandInService
from tests.support.waiting import until

pytestmark = pytest.mark.slow

# The lock is as long as it is on the network: a crash and restart must not look like a validator's forgetfulness.
LIMITS = replace(Limits().compressed(300), validation_lock=0.05)
READY_S = 90.0


class Books(Rules):
    """A validator's rules that write down each task's life. Prompts are unique, so that a generation has a task."""

    def __init__(self, uid: int, miner: str) -> None:
        super().__init__(LIMITS, [miner], (f"object {n} of validator {uid}" for n in range(10**6)))
        self.assigned: list[Task] = []
        self.submitted: Counter[str] = Counter()  # whatever came of it
        self.accepted: Counter[str] = Counter()
        self.paused = False

    def pull(self, hotkey: str) -> PullAnswer:
        if self.paused and self.miners[hotkey].task is None:
            # A cooldown: by an answer without one the miner learns nothing of a result that it keeps.
            return PullAnswer(cooldown_until=math.ceil(self.clock()) + 1)
        answer = super().pull(hotkey)
        if answer.task is not None and answer.task not in self.assigned:
            self.assigned.append(answer.task)
        return answer

    def receive(self, hotkey: str, task_id: str, signed: Callable[[Task], bool], empty: bool) -> Judgement | Task:
        self.submitted[task_id] += 1
        return super().receive(hotkey, task_id, signed, empty)

    def score(self, hotkey: str, score: float | None) -> Judgement:
        task = self.miners[hotkey].task
        judgement = super().score(hotkey, score)
        if judgement.outcome == "accepted" and task is not None:
            self.accepted[task.id] += 1
        return judgement


class Service(StandInService):
    """Takes a while, and can be killed and started again at the same port."""

    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self._answers = asyncio.Event()
        self._in_work = 0

    async def __aenter__(self) -> Service:
        await self.start()
        return self

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self._health)
        app.router.add_post("/generate/", self._generate)
        app.router.add_post("/validate_txt_to_3d_ply/", self._validate)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._answers.set()

    async def kill(self) -> None:
        """Goes with at least one generation unfinished: an idle service that goes need not be noticed."""
        self._answers.clear()
        await until(lambda: self._in_work > 0, 60)
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.Response:
        self._in_work += 1
        try:
            await asyncio.sleep(random.uniform(0.02, 0.2))
            await self._answers.wait()
            return await super()._generate(request)
        finally:
            self._in_work -= 1

    async def _validate(self, request: web.Request) -> web.Response:
        await request.read()
        self.scored += 1
        return web.json_response({"score": 0.8})


class Miner:
    """The miner's process."""

    def __init__(self, folder: Path, endpoint: str, limits: Callable[[], None] | None = None) -> None:
        self.log = folder / "miner.log"
        self.spool = folder / "spool"
        self._status = folder / "miner.status"
        self._limits = limits
        self._arguments = (
            *("--network", "rehearsal", "--rehearsal.state", str(folder), "--generation.endpoint", endpoint),
            *("--spool", str(self.spool), "--ledger", str(folder / "ledger.sqlite"), "--metrics-port", "0"),
            *("--logging.file", str(self.log), "--status-file", str(self._status), "--workers", "8"),
        )
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self._status.unlink(missing_ok=True)
        command = [sys.executable, "-m", "neurons.serve_miner_competitive", *self._arguments]
        self._process = subprocess.Popen(  # noqa: ASYNC220 - quick, and killed by tests that wait for nothing
            command, cwd=ROOT, stdin=subprocess.DEVNULL, preexec_fn=self._limits
        )
        await until(self._status.exists, READY_S)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    async def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(self._process.wait, 40) == 0

    def end(self) -> None:
        if self._process is not None:
            self.kill()


class Stage:
    def __init__(self, network: RehearsalNetwork, service: Service, books: list[Books], miner: Miner) -> None:
        self.network, self.service, self.books, self.miner = network, service, books, miner

    @property
    def accepted(self) -> int:
        return sum(sum(book.accepted.values()) for book in self.books)

    def has_accepted(self, count: int) -> bool:
        return self.accepted >= count

    async def all_done(self) -> None:
        """No new tasks; waits until the assigned ones are handed in, and the miner knows what became of them.

        A result whose answer was lost is kept until its validator's next pull.
        """
        for book in self.books:
            book.paused = True
        await until(lambda: all(book.miners[self.network.miner_hotkey].task is None for book in self.books), 120)
        await until(lambda: self.kept == [LOCK_NAME], 60)

    @property
    def kept(self) -> list[str]:
        """The files of the miner's spool."""
        return [path.name for path in self.miner.spool.iterdir()]

    def check(self, interruptions: int) -> None:
        """Every task was accepted exactly once, and next to nothing was done twice."""
        for book in self.books:
            assert {task.id: 1 for task in book.assigned} == dict(book.accepted)
            assert book.miners[self.network.miner_hotkey].violations == 0
        submissions = sum(sum(book.submitted.values()) for book in self.books)
        # Only what was under way when something broke may have been done again.
        assert submissions - self.accepted <= interruptions * len(self.books)
        generations = Counter(self.service.prompts)
        assert generations.keys() >= {task.prompt for book in self.books for task in book.assigned}
        assert generations.total() - len(generations) <= interruptions * 8
        assert self.kept == [LOCK_NAME]
        assert "Traceback" not in self.miner.log.read_text()


@asynccontextmanager
async def stage(folder: Path, validators: int, limits: Callable[[], None] | None = None) -> AsyncIterator[Stage]:
    # Validators have a scoring service of their own, which is not killed: a result without a score is lost.
    async with Service() as service, Service() as scoring:
        network = RehearsalNetwork(folder, scoring.endpoint, validators + 1, LIMITS, ["never used"])
        books = []
        for validator in network.validators:
            validator.rules = Books(validator.uid, network.miner_hotkey)
            if validator.uid != 180:
                books.append(validator.rules)
        await asyncio.to_thread(network.__enter__)
        miner = Miner(folder, service.endpoint, limits)
        try:
            yield Stage(network, service, books, miner)
        finally:
            miner.end()
            await asyncio.to_thread(network.__exit__)


@pytest.mark.timeout(500)
async def test_killed_at_random_moments_over_200_tasks(tmp_path: Path) -> None:
    randomness = random.Random(17)
    kills = 0
    async with stage(tmp_path, validators=12) as scene:
        await scene.miner.start()
        while scene.accepted < 200:
            before = scene.accepted
            await until(partial(scene.has_accepted, before + 1), 60)  # it works again
            await asyncio.sleep(randomness.uniform(0, 4))
            scene.miner.kill()
            kills += 1
            await scene.miner.start()
        await scene.all_done()
        await scene.miner.stop()
        print(f"{kills} kills, {scene.accepted} tasks, {len(scene.service.prompts)} generations")
        assert kills >= 5
        scene.check(interruptions=kills)


async def test_the_service_is_killed_and_comes_back(tmp_path: Path) -> None:
    async with stage(tmp_path, validators=6) as scene:
        await scene.miner.start()
        for _ in range(3):
            before = scene.accepted
            await until(partial(scene.has_accepted, before + 10), 60)
            await scene.service.kill()
            await asyncio.sleep(2)
            await scene.service.start()
        await until(partial(scene.has_accepted, scene.accepted + 10), 60)
        await scene.all_done()
        await scene.miner.stop()
        scene.check(interruptions=3)
        assert len(re.findall("Generation service at .* left out", scene.miner.log.read_text())) >= 3


async def test_a_disk_without_room(tmp_path: Path) -> None:
    """No file may grow over 100 kB: neither a spooled result (120 kB) nor, after a while, log and ledger."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    async with stage(tmp_path, validators=6, limits=limit) as scene:
        await scene.miner.start()
        await until(lambda: scene.accepted >= 80, 120)
        await scene.all_done()
        await scene.miner.stop()
        scene.check(interruptions=0)
        assert "the result for validator [1] is in memory alone" in scene.miner.log.read_text()


class Line:
    """A network cable to one validator: forwards connections, or aborts them and takes no new ones."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def connect(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        ends = {writer, back}
        self._writers |= ends
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        self._writers -= ends

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        with suppress(ConnectionError):
            writer.close()


@pytest.mark.timeout(300)
async def test_the_network_is_gone_for_a_while(tmp_path: Path) -> None:
    async with stage(tmp_path, validators=6) as scene:
        lines = {validator.hotkey: Line(validator.port) for validator in scene.network.validators}
        for line in lines.values():
            await line.connect()
        file = tmp_path / "network.json"
        metagraph = chain.load(file)
        neurons = [replace(n, port=lines[n.hotkey].port if n.hotkey in lines else n.port) for n in metagraph.neurons]
        chain.save(replace(metagraph, neurons=tuple(neurons)), file)

        await scene.miner.start()
        for seconds in (1, 10):
            before = scene.accepted
            await until(partial(scene.has_accepted, before + 12), 90)
            for line in lines.values():
                line.cut()
            await asyncio.sleep(seconds)
            for line in lines.values():
                await line.connect()
        await until(partial(scene.has_accepted, scene.accepted + 12), 90)
        await scene.all_done()
        await scene.miner.stop()
        for line in lines.values():
            line.cut()
        scene.check(interruptions=2)
