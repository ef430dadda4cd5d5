"""Several engines around a stand-in pipeline: sharing, failing over, coming back.

They are real processes, and then all the same as actors of a real Ray cluster.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from generation.engine.engine import DeadlineExceeded, StageFailed, Unavailable
from generation.fleet import fleet as fleet_module
from generation.fleet import remote
from generation.fleet.actors import ActorEngine
from generation.fleet.cluster import Cluster
from generation.fleet.fleet import Fleet
from generation.fleet.process import ProcessEngine
from generation.schema.results import Request
from tests.support import fleet_harness, fleet_standin, ray_head
from tests.support.fleet_harness import DEVICES, PATIENCE_S, ask, children, pid_of, running, starting, states
from tests.support.waiting import until


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Cluster, psutil.Process]]:
    with ray_head.head(engines=2) as (address, process), ray_head.joined(address) as joined:
        yield joined, process


@pytest.fixture(autouse=True, params=["process", pytest.param("actor", marks=pytest.mark.slow)])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of an engine."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.05)
    if request.param == "actor":
        joined, process = request.getfixturevalue("cluster")
        monkeypatch.setattr(fleet_harness, "FORM", partial(ray_head.actor_of, joined))
        monkeypatch.setattr(fleet_harness, "RAY", process)
    return {"process": ProcessEngine, "actor": ActorEngine}[request.param]


async def test_each_request_goes_to_the_engine_with_the_least_work(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with running(tmp_path) as fleet:
        held = [ask(fleet, f"hold {go}", seed) for seed in range(4)]
        await until(lambda: [len(each["active"]) for each in fleet.health()] == [2, 2])
        waiting = [ask(fleet, "a", seed) for seed in range(3)]
        await until(lambda: fleet.queue_depth == 3)
        with pytest.raises(Unavailable, match="queue full: 3") as refused:
            await ask(fleet, "b")
        assert refused.value.retry_after is not None
        go.touch()
        outcomes = await asyncio.gather(*held, *waiting)
        first, second = ([pid_of(each) for each in outcomes if each.report.device == device] for device in DEVICES)
        assert len(set(first)) == len(set(second)) == 1
        assert set(first) != set(second)
        assert sorted(each.report.seed for each in outcomes) == [0, 0, 1, 1, 2, 2, 3]
        assert (await ask(fleet, "reject")).report.rejected
        with pytest.raises(StageFailed, match="the stage broke"):
            await ask(fleet, "crash")
        image = await fleet.generate(Request(image=Image.new("RGBA", (3, 2)), seed=5, threshold=0.6))
        assert image.ply.endswith(b"RGBA (3, 2) 5")
        totals = {"requests": 10, "delivered": 8, "rejected": 1, "failed": 1, "cancelled": 0, "refused": 1}
        assert fleet.totals == totals
        assert fleet.models == fleet_standin.Pipeline.models


async def test_an_engine_killed_with_work_on_it_is_replaced_and_its_requests_are_answered(
    tmp_path: Path, form: Any, caplog: pytest.LogCaptureFixture
) -> None:
    go = tmp_path / "go"
    cause = {ProcessEngine: "killed by SIGKILL", ActorEngine: "killed or crashed"}[form]
    async with running(tmp_path) as fleet:
        requests = [ask(fleet, f"hold {go}", seed) for seed in range(7)]
        await until(lambda: len(fleet.active) == 4)
        victim = children()[0]
        victim.send_signal(signal.SIGKILL)
        await until(lambda: "failed" in states(fleet))
        assert cause in fleet.reason
        assert fleet.status == "ready"
        (failed,) = [each for each in fleet.health() if each["status"] == "failed"]
        assert failed["reason"] == f"its process was {cause}; to be started again"
        assert failed["active"] == []
        go.touch()
        assets = await asyncio.gather(*requests)
        assert sorted(asset.report.seed for asset in assets) == list(range(7))
        assert victim.pid not in {pid_of(asset) for asset in assets}
        await until(lambda: states(fleet) == ["ready", "ready"])
        again = await asyncio.gather(*(ask(fleet, "a") for _ in range(2)))
        assert len({pid_of(asset) for asset in again}) == 2
        assert fleet.totals["delivered"] == fleet.totals["requests"] == 9
    assert any(f"out of rotation: its process was {cause}. Its 2 requests" in text for text in caplog.messages)


@pytest.mark.parametrize("word", ["die", "cuda", pytest.param("host", marks=pytest.mark.slow)])
async def test_what_an_engine_fails_at_runs_elsewhere(tmp_path: Path, word: str) -> None:
    async with running(tmp_path) as fleet:
        before = {child.pid for child in children()}
        asset = await ask(fleet, f"{word} {tmp_path / 'done'}")
        assert asset.report.device == "second"
        assert pid_of(asset) in before
        await until(lambda: states(fleet) == ["ready", "ready"])
        assert len(before & {child.pid for child in children()}) == 1


async def test_a_request_that_every_engine_fails_at_is_given_up(tmp_path: Path) -> None:
    async with running(tmp_path) as fleet:
        with pytest.raises(StageFailed, match=r"lost: first: .*unspecified launch failure; second: .*; "):
            await ask(fleet, "always")
        await until(lambda: states(fleet) == ["ready", "ready"])
        assert (await ask(fleet, "a")).ply


@pytest.mark.slow
async def test_on_one_engine_the_neighbours_of_what_kills_it_are_answered(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with running(tmp_path, ("only",), max_queue=8, max_batch=4) as fleet:
        neighbours = [ask(fleet, f"hold {go}", seed) for seed in range(3)]
        await until(lambda: len(fleet.active) == 3)
        culprit = ask(fleet, "always")
        await until(lambda: states(fleet) == ["failed"])
        later = asyncio.create_task(_when_ready(fleet))
        go.touch()
        assert sorted(asset.report.seed for asset in await asyncio.gather(*neighbours)) == [0, 1, 2]
        with pytest.raises(StageFailed, match="every engine that it ran on was lost"):
            await culprit
        assert (await later).ply
        await until(lambda: states(fleet) == ["ready"])
        assert fleet.totals["delivered"] == 4
        assert fleet.totals["failed"] == 1


async def _when_ready(fleet: Fleet) -> Any:
    """A request that comes while others run alone."""
    while True:
        await until(lambda: fleet.status == "ready")
        with suppress(Unavailable):  # the culprit may have taken the engine down again in this moment
            return await ask(fleet, "a")


async def test_what_runs_again_has_its_engine_for_itself(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with running(tmp_path, ("only",), max_queue=8, max_batch=4) as fleet:
        again = [ask(fleet, f"hold {go}", seed) for seed in range(2)]
        await until(lambda: len(fleet.active) == 2)
        children()[0].kill()
        await until(lambda: states(fleet) == ["ready"] and len(fleet.active) == 1)
        new = ask(fleet, "a")
        await until(lambda: fleet.queue_depth == 2)
        assert len(fleet.active) == 1
        go.touch()
        assert len(await asyncio.gather(*again, new)) == 3


async def test_out_of_memory_fails_the_request_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as fleet:
        before = {child.pid for child in children()}
        with pytest.raises(StageFailed, match="out of memory"):
            await ask(fleet, "memory")
        await ask(fleet, "a")
        assert states(fleet) == ["ready", "ready"]
        assert before == {child.pid for child in children()}


async def test_with_all_engines_gone_requests_wait_for_one_that_comes_back(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with running(tmp_path) as fleet:
        requests = [ask(fleet, f"hold {go}", seed) for seed in range(5)]
        await until(lambda: len(fleet.active) == 4)
        for child in children():
            child.kill()
        await until(lambda: fleet.status != "ready")
        with pytest.raises(Unavailable) as refused:
            await ask(fleet, "a")
        assert refused.value.retry_after is not None
        go.touch()
        assert len(await asyncio.gather(*requests)) == 5


@pytest.mark.slow
async def test_with_all_engines_unable_to_load_requests_are_turned_away_until_one_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    async with running(tmp_path, max_batch=1) as fleet:
        requests = [ask(fleet, f"hold {tmp_path / 'go'}") for _ in range(4)]
        await until(lambda: len(fleet.active) == 2)
        broken.touch()
        monkeypatch.setattr(remote, "MAX_PAUSE_S", 0.3)
        for child in children():
            child.kill()
        for outcome in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
            assert outcome.retry_after is not None
            assert "flux.1-schnell is not on this machine" in str(outcome)
        broken.unlink()
        await until(lambda: states(fleet) == ["ready", "ready"])
        assert (await ask(fleet, "a")).ply


async def test_one_that_loads_is_enough_and_health_tells_of_the_other(tmp_path: Path) -> None:
    go, broken = tmp_path / "go", tmp_path / "broken"
    async with running(tmp_path, max_batch=1) as fleet:
        await asyncio.gather(*(ask(fleet, "a") for _ in range(2)))
        broken.touch()
        children()[0].kill()
        await until(lambda: any("loading failed" in each["reason"] for each in fleet.health()))
        requests = [ask(fleet, f"hold {go}") for _ in range(3)]
        await until(lambda: (fleet.queue_depth, len(fleet.active)) == (2, 1))
        go.touch()
        assert len({pid_of(asset) for asset in await asyncio.gather(*requests)}) == 1


async def test_stopping_waits_for_a_process_that_is_ending(
    tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, ending = form._finish, asyncio.Event()

    async def finishing(engine: Any) -> None:
        ending.set()
        await finish(engine)

    monkeypatch.setattr(form, "_finish", finishing)
    (tmp_path / "broken").touch()
    async with starting(tmp_path, devices=("only",)):
        await ending.wait()
    # `starting` makes sure that no process is left


async def test_a_cancelled_request_stops_in_its_process_and_frees_its_place(tmp_path: Path) -> None:
    async with running(tmp_path, devices=("only",), max_batch=1) as fleet:
        held, waiting = ask(fleet, f"hold {tmp_path / 'never'}"), ask(fleet, "b")
        await until(lambda: fleet.active and fleet.queue_depth == 1)
        waiting.cancel()
        await until(lambda: fleet.queue_depth == 0)
        held.cancel()
        await until((tmp_path / "never.cancelled").exists)
        assert (await ask(fleet, "a")).ply
        assert fleet.totals["cancelled"] == 2


async def test_a_request_that_takes_too_long_ends_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, devices=("only",), max_batch=1) as fleet:
        monkeypatch.setattr(fleet_module, "TIMEOUT_S", 0.1)
        outcomes = await asyncio.gather(
            ask(fleet, f"hold {tmp_path / 'never'}"), ask(fleet, "waits"), return_exceptions=True
        )
        assert all(isinstance(outcome, DeadlineExceeded) for outcome in outcomes)
        await until((tmp_path / "never.cancelled").exists)


async def test_progress_is_told(tmp_path: Path) -> None:
    async with running(tmp_path, devices=("only",)) as fleet:
        told: list[tuple[str, float]] = []
        request = Request(prompt="a", seed=1, threshold=0.6)
        await fleet.generate(request, lambda *progress: told.append(progress))
        assert told == [("dreamgaussian", 0.25)]


async def test_what_a_person_asks_for_pauses_the_background_where_it_disturbs_least(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with running(tmp_path, max_batch=1, max_queue=1) as fleet:
        background = [ask(fleet, f"hold {go}", background=True) for _ in range(2)]
        await until(lambda: len(fleet.active) == 2)
        background.append(ask(fleet, "b", background=True))
        await until(lambda: fleet.queue_depth == 1)
        with pytest.raises(Unavailable, match="queue full"):
            await ask(fleet, "c", background=True)
        assert (await ask(fleet, "a")).ply  # though both are busy, and the queue is full
        persons = [ask(fleet, f"hold {go}") for _ in range(2)]
        await until(lambda: [each["active"][0]["stage"] for each in fleet.health()] == ["paused"] * 2)
        go.touch()
        assert all(asset.ply for asset in await asyncio.gather(*background, *persons))
        idle, busy = ask(fleet, "a"), ask(fleet, "a", background=True)
        assert (await idle).report.device != (await busy).report.device


async def test_calls(tmp_path: Path) -> None:
    async with running(tmp_path) as fleet:
        assert await fleet.call(fleet_standin.pid) in {child.pid for child in children()}
        with pytest.raises(ValueError, match="invalid literal"):
            await fleet.call(partial(fleet_standin.parse, text="x"))
        with pytest.raises(StageFailed, match="TypeError"):
            await fleet.call(partial(fleet_standin.parse, text=None))  # type: ignore[arg-type]  # on purpose
        with pytest.raises((AttributeError, TypeError), match="lambda"):
            await fleet.call(lambda pipeline: 1)
        held = [ask(fleet, f"hold {tmp_path / 'go'}") for _ in range(4)]
        await until(lambda: len(fleet.active) == 4)
        assert await fleet.call(partial(fleet_standin.parse, text="7")) == 7  # not behind what runs
        (tmp_path / "go").touch()
        await asyncio.gather(*held)


async def test_stopping_ends_requests_and_processes(tmp_path: Path, form: Any) -> None:
    async with running(tmp_path) as fleet:
        requests = [ask(fleet, f"hold {tmp_path / 'never'}") for _ in range(6)]
        await until(lambda: len(fleet.active) == 4)
        processes = children()
        assert len(processes) == 2
        await asyncio.to_thread(fleet.stop, PATIENCE_S)
        for outcome in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
            assert "shutting down" in str(outcome)
        if form is ActorEngine:  # Ray has only told them to end
            await until(lambda: not any(psutil.pid_exists(process.pid) for process in processes))
        assert not any(psutil.pid_exists(process.pid) for process in processes)
        with pytest.raises(Unavailable):
            await ask(fleet, "a")
        assert (fleet.status, fleet.reason) == ("failed", "shutting down")


async def test_a_fleet_that_loads_says_when_to_return(tmp_path: Path) -> None:
    async with starting(tmp_path) as fleet:
        with pytest.raises(Unavailable, match="loading") as refused:
            await ask(fleet, "a")
        assert refused.value.retry_after is not None
