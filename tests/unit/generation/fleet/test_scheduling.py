"""Which engine takes which request, and what a lost engine means for them: the fleet without processes."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pytest

from generation.engine.engine import DeadlineExceeded, StageFailed, Unavailable
from generation.fleet import fleet as fleet_module
from generation.fleet.candidates import Candidates
from generation.fleet.messages import State
from generation.fleet.remote import EngineLost, NotSent, RemoteEngine
from generation.schema.results import Asset, Report, Request
from tests.support.fleet_harness import ask, fleet_of


class Engines:
    """Takes the place of the processes. ``faults`` has what becomes of the next runs of a prompt; others take their
    time, until ``finish``.
    """

    def __init__(self) -> None:
        self.faults: dict[str, deque[Exception]] = defaultdict(deque)
        self.runs: list[tuple[str, str]] = []  # prompt, device
        self.running: dict[str, asyncio.Future[None]] = {}

    async def generate(self, remote: RemoteEngine, request: Request, on_progress: Any) -> Asset:
        prompt = str(request.prompt)
        self.runs.append((prompt, remote.device))
        if self.faults[prompt]:
            raise self.faults[prompt].popleft()
        self.running[prompt] = asyncio.get_running_loop().create_future()
        try:
            await self.running[prompt]
        finally:
            del self.running[prompt]
        return Asset(b"ply", Report(request.seed, device=remote.device))

    def finish(self, prompt: str) -> None:
        self.running[prompt].set_result(None)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    standin = Engines()

    async def generate(remote: RemoteEngine, request: Request, on_progress: Any) -> Asset:
        return await standin.generate(remote, request, on_progress)

    monkeypatch.setattr(RemoteEngine, "generate", generate)
    return standin


def ready(folder: Path, *devices: str, max_batch: int = 4) -> Any:
    fleet = fleet_of(folder, devices, max_queue=8, max_batch=max_batch)
    for engine in fleet._engines:
        engine._set("ready", "all models are loaded")
    return fleet


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_request_that_was_never_sent_lost_no_engine(tmp_path: Path, engines: Engines) -> None:
    fleet = ready(tmp_path, "only")
    neighbour = ask(fleet, "neighbour")
    engines.faults["p"].extend([NotSent("gone")] * 5)  # more often than an engine may be lost
    asked = ask(fleet, "p")
    await settle()
    assert set(engines.running) == {"neighbour", "p"}  # it is not suspected, either: nobody has to go
    for prompt in ("neighbour", "p"):
        engines.finish(prompt)
    assert (await asked).ply
    assert (await neighbour).ply


async def test_a_request_that_loses_three_engines_is_given_up(tmp_path: Path, engines: Engines) -> None:
    fleet = ready(tmp_path, "only")
    engines.faults["p"].extend([EngineLost("died"), NotSent("gone"), EngineLost("died"), EngineLost("died")])
    with pytest.raises(StageFailed, match="only: died; only: died; only: died"):
        await ask(fleet, "p")
    assert len(engines.runs) == 4


async def test_what_runs_alone_holds_up_one_engine_and_no_other(tmp_path: Path, engines: Engines) -> None:
    fleet = ready(tmp_path, "first", "second")
    for prompt in ("a", "b", "c"):
        ask(fleet, prompt)
        await settle()
    engines.faults["suspect"].append(EngineLost("died"))
    ask(fleet, "suspect")
    await settle()
    assert "suspect" not in engines.running  # neither engine is free: it waits for the second, which has one request
    ask(fleet, "person")
    ask(fleet, "another")
    await settle()
    assert [device for prompt, device in engines.runs if prompt in ("person", "another")] == ["first", "first"]
    engines.finish("b")
    await settle()
    assert engines.runs[-1] == ("suspect", "second")
    ask(fleet, "beside it?")  # the first engine is full
    await settle()
    assert "beside it?" not in engines.running
    engines.finish("a")
    await settle()
    assert engines.runs[-1] == ("beside it?", "first")
    for prompt in list(engines.running):
        engines.finish(prompt)
    await settle()


async def test_a_person_does_not_wait_for_what_runs_alone_in_the_background(tmp_path: Path, engines: Engines) -> None:
    fleet = ready(tmp_path, "only")
    engines.faults["suspect"].append(EngineLost("died"))
    ask(fleet, "suspect", background=True)
    await settle()
    persons = [ask(fleet, prompt) for prompt in ("person", "another")]
    ask(fleet, "miner's", background=True)
    await settle()
    assert set(engines.running) == {"suspect", "person", "another"}
    for prompt in ("person", "another"):
        engines.finish(prompt)
    await asyncio.gather(*persons)
    await settle()
    assert set(engines.running) == {"suspect"}  # which still runs alone
    engines.finish("suspect")
    await settle()
    assert set(engines.running) == {"miner's"}
    engines.finish("miner's")
    await settle()


async def test_a_person_goes_before_what_waits_in_the_background_to_run_alone(tmp_path: Path, engines: Engines) -> None:
    fleet = ready(tmp_path, "only", max_batch=1)
    ask(fleet, "first")
    await settle()
    engines.faults["suspect"].append(EngineLost("died"))
    ask(fleet, "suspect", background=True)
    ask(fleet, "person")
    await settle()
    engines.finish("first")
    await settle()
    assert set(engines.running) == {"person"}
    engines.finish("person")
    await settle()
    assert set(engines.running) == {"suspect"}
    engines.finish("suspect")
    await settle()


async def test_what_a_lost_engine_had_goes_before_what_waits(tmp_path: Path, engines: Engines) -> None:
    fleet = ready(tmp_path, "only", max_batch=1)
    (engine,) = fleet._engines
    ask(fleet, "lost")
    await settle()
    ask(fleet, "waits")
    await settle()
    engine._set("loading", "starting")
    engines.running["lost"].set_exception(EngineLost("died"))
    await settle()
    engine._set("ready", "all models are loaded")
    fleet._hand_out()
    for prompt in ("lost", "waits"):
        await settle()
        assert set(engines.running) == {prompt}
        engines.finish(prompt)
    await settle()


async def test_what_is_in_the_background_is_not_put_where_a_person_would_pause_it(
    tmp_path: Path, engines: Engines
) -> None:
    fleet = ready(tmp_path, "only")
    ask(fleet, "person")
    ask(fleet, "miner's", background=True)
    for prompt in ("person", "miner's"):
        await settle()
        assert set(engines.running) == {prompt}
        engines.finish(prompt)
    await settle()


async def test_a_person_goes_where_the_fewest_persons_are(tmp_path: Path, engines: Engines) -> None:
    fleet = ready(tmp_path, "first", "second")
    ask(fleet, "miner's", background=True)
    await settle()
    for prompt, background in (("person", False), ("miner's too", True), ("another", False)):
        ask(fleet, prompt, background=background)
        await settle()
    devices = dict(engines.runs)
    assert devices == {"miner's": "first", "person": "second", "miner's too": "first", "another": "first"}
    for prompt in list(engines.running):
        engines.finish(prompt)
    await settle()


async def test_an_engine_takes_as_many_at_once_as_it_says_that_fit(tmp_path: Path, engines: Engines) -> None:
    fleet = ready(tmp_path, "only")
    (engine,) = fleet._engines
    engine._take(State([], {**engine.health(), "at_once": 1}))
    asked = [ask(fleet, prompt, background=True) for prompt in ("a", "b")]
    for prompt in ("a", "b"):
        await settle()
        assert set(engines.running) == {prompt}
        engines.finish(prompt)
    await asyncio.gather(*asked)


def test_without_an_engine_clients_come_back_when_the_next_one_starts(tmp_path: Path) -> None:
    fleet = ready(tmp_path, "first", "second")
    for engine, pause in zip(fleet._engines, (100.0, 60.0), strict=True):
        engine._set("failed", "it broke")
        engine.next_start = time.monotonic() + pause
    with pytest.raises(Unavailable) as refused:
        fleet.check_admission()
    assert refused.value.retry_after in (59, 60)


async def test_the_background_waits_for_as_long_as_it_takes(
    tmp_path: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "TIMEOUT_S", 0.01)
    fleet = ready(tmp_path, "only")
    miners, person = ask(fleet, "miner's", background=True), ask(fleet, "person")
    with pytest.raises(DeadlineExceeded):
        await person
    engines.finish("miner's")
    assert (await miners).ply


async def test_an_engine_whose_process_ended_is_asked_no_more(tmp_path: Path) -> None:
    fleet = ready(tmp_path, "only")
    (engine,) = fleet._engines
    engine._end_of_link(asyncio.Event())
    assert engine.status == "ready"  # until its exit status is known
    with pytest.raises(NotSent):
        await engine.call(len)
    waiting = ask(fleet, "p")
    await settle()
    assert not waiting.done()
    assert fleet.queue_depth == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_candidates_spread_over_the_engines_and_leave_a_place(tmp_path: Path, monkeypatch: Any) -> None:
    running: list[str] = []
    go = asyncio.Event()

    async def generate(remote: RemoteEngine, request: Request, on_progress: Any) -> Asset:
        running.append(remote.device)
        await go.wait()
        return Asset(b"ply", Report(request.seed, score=0.7, num_gaussians=9000))

    monkeypatch.setattr(RemoteEngine, "generate", generate)
    fleet = ready(tmp_path, "first", "second", max_batch=2)
    request = Request(prompt="p", seed=1, threshold=0.6, background=True, candidates=4)
    asking = asyncio.create_task(Candidates(fleet).generate(request))
    await settle()
    assert sorted(running) in (["first", "first", "second"], ["first", "second", "second"])
    assert fleet.spare(background=True) == 0
    go.set()
    assert len((await asking).report.candidates) == 4


async def test_an_engine_whose_machine_has_left_gives_up_its_requests_at_once(tmp_path: Path) -> None:
    """Before its supervision has ended: that may wait for a machine that does not answer."""
    fleet = ready(tmp_path, "leaves", "stays")
    leaving = fleet._engines[0]
    supervision = asyncio.create_task(asyncio.sleep(3600))
    fleet._supervision[leaving] = supervision
    request: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    leaving._asked[1] = (request, None)
    fleet._remove(leaving, "its machine has left")
    with pytest.raises(EngineLost, match="its machine has left"):
        request.result()
    assert [each["device"] for each in fleet.health()] == ["stays"]
    await settle()
    assert supervision.cancelled()
    assert leaving not in fleet._supervision
