"""A fleet over a real Ray cluster: machines that come and go, who is let in, and what an actor differs in.

The machines are Ray's nodes on this one. What all engines have in common is in test_fleet.py.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from generation.engine.engine import Unavailable
from generation.fleet import actors, remote
from generation.fleet.actors import ActorEngine, ClusterFleet
from generation.fleet.cluster import Cluster
from tests.support import fleet_harness, fleet_standin, ray_head
from tests.support.fleet_harness import PATIENCE_S, ask, children, pid_of, states
from tests.support.service_harness import wait_until
from tests.support.waiting import until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LOADER = "tests.support.fleet_standin:load"


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, psutil.Process]]:
    with ray_head.head(engines=0) as (address, process):
        yield address, process


@pytest.fixture(scope="module")
def cluster(head: tuple[str, psutil.Process]) -> Iterator[Cluster]:
    with ray_head.joined(head[0]) as joined:
        yield joined


@pytest.fixture(scope="module")
def machine(head: tuple[str, psutil.Process]) -> Iterator[psutil.Process]:
    """One that is there all the time, with one engine."""
    with ray_head.node(f"--address={head[0]}", engines=1) as process:
        yield process


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(actors, "LOOK_S", 0.05)


@asynccontextmanager
async def fleet_on(cluster: Cluster, folder: Path, resolve: Any = None) -> AsyncIterator[ClusterFleet]:
    resolve = resolve or partial(fleet_standin.resolve, fleet_harness.settings(folder))
    fleet = ClusterFleet(cluster, resolve, 8, LOADER)
    fleet.start()
    try:
        yield fleet
    finally:
        await asyncio.to_thread(fleet.stop, PATIENCE_S)


async def test_machines_come_and_go(
    head: tuple[str, psutil.Process], cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = tmp_path / "go"
    one, two = (ray_head.node(f"--address={head[0]}", engines=1) for _ in range(2))
    async with fleet_on(cluster, tmp_path) as fleet:
        assert (fleet.status, fleet.health()) == ("loading", [])
        assert "none with a GPU has joined" in fleet.reason
        with pytest.raises(Unavailable, match="has joined") as refused:
            await ask(fleet, "a")
        assert refused.value.retry_after == 5
        with one as first_machine:
            await until(lambda: states(fleet) == ["ready"])
            assert (await ask(fleet, "a")).report.device == fleet.health()[0]["device"]
            assert fleet.health()[0]["machine"] in fleet.health()[0]["device"]
            with two:
                await until(lambda: states(fleet) == ["ready", "ready"])
                assert len({each["device"] for each in fleet.health()}) == 2
                requests = [ask(fleet, f"hold {go}", seed) for seed in range(5)]
                await until(lambda: [len(each["active"]) for each in fleet.health()] == [2, 2])
                stays = fleet.health()[1]["device"]
                kill(first_machine)  # all at once, as a power cut does
                await until(lambda: states(fleet) == ["ready"])
                assert fleet.health()[0]["device"] == stays
                go.touch()
                assets = await asyncio.gather(*requests)
                assert sorted(each.report.seed for each in assets) == list(range(5))
                assert {each.report.device for each in assets} == {stays}
                never = ask(fleet, f"hold {tmp_path / 'never'}")
                await until(lambda: fleet.active)
            # It was told to end, and has; the request waits for a machine, which does not come.
            await until(lambda: fleet.health() == [])
            assert not never.done()
            assert (fleet.status, fleet.queue_depth) == ("loading", 1)
            monkeypatch.setattr(actors, "MACHINE_BACK_S", 0.0)
            with pytest.raises(Unavailable, match="has joined"):
                await never


def kill(process: psutil.Process) -> None:
    for each in [process, *process.children(recursive=True)]:
        each.kill()


async def test_settings_are_resolved_on_the_machine_and_shown(
    cluster: Cluster, machine: psutil.Process, tmp_path: Path
) -> None:
    resolve = partial(fleet_standin.resolve_there, fleet_harness.settings(tmp_path))
    async with fleet_on(cluster, tmp_path, resolve) as fleet:
        before = fleet.resolved
        await until(lambda: states(fleet) == ["ready"])
        assert before is None
        assert fleet.resolved.process == await fleet.call(fleet_standin.pid) != os.getpid()
        assert fleet.health()[0]["memory_class"] == "24 GB"
        # Both of the machine's cores are its only engine's; Ray alone would say 1.
        assert await fleet.call(partial(fleet_standin.variable, name="OMP_NUM_THREADS")) == "2"


async def test_each_gpu_has_an_engine_that_sees_no_other(
    head: tuple[str, psutil.Process], cluster: Cluster, tmp_path: Path
) -> None:
    """Ray is told of two; there need not be any."""
    with ray_head.node(f"--address={head[0]}", engines=1, gpus=2):
        async with fleet_on(cluster, tmp_path) as fleet:
            await until(lambda: [each.status for each in gpus(fleet)] == ["ready"] * 2)
            visible = partial(fleet_standin.variable, name="CUDA_VISIBLE_DEVICES")
            seen = {await engine.call(visible) for engine in gpus(fleet)}
            assert seen == {"0", "1"}


def gpus(fleet: ClusterFleet) -> list[Any]:
    return [each for each in fleet._engines if "/gpu" in each.device]


async def test_an_engine_that_would_make_other_splats_is_refused(
    cluster: Cluster, machine: psutil.Process, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resolve = partial(fleet_standin.resolve_there, fleet_harness.settings(tmp_path))
    async with fleet_on(cluster, tmp_path, resolve) as fleet:
        fleet.resolved = fleet_standin.resolve_there(fleet_harness.settings(tmp_path))
        fleet.resolved.profile = "full"
        await until(lambda: any("other splats than the first engine's: profile" in text for text in caplog.messages))
        assert "ready" not in states(fleet)


async def test_what_can_not_be_resolved_there_is_told(
    cluster: Cluster, machine: psutil.Process, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet_on(cluster, tmp_path, partial(int, "x")):
        await until(
            lambda: any("settings can not be resolved: ValueError: invalid" in text for text in caplog.messages)
        )


async def test_an_engine_of_other_software_is_refused(
    cluster: Cluster, machine: psutil.Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = actors.software()
    monkeypatch.setattr(actors, "software", lambda: ours.replace("code", "codes"))
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 60.0)
    async with fleet_on(cluster, tmp_path) as fleet:
        reason = f"its machine has {ours}, and this service is {actors.software()}; to be started again"
        await until(lambda: [each["reason"] for each in fleet.health()] == [reason])


async def test_an_actor_that_says_nothing_is_replaced(
    head: tuple[str, psutil.Process],
    cluster: Cluster,
    machine: psutil.Process,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As behind a cut cable."""
    assert ActorEngine.silent_checks * remote.CHECK_S <= 20
    monkeypatch.setattr(remote, "CHECK_S", 0.4)
    monkeypatch.setattr(remote, "ENDING_S", 0.1)
    monkeypatch.setattr(ActorEngine, "silent_checks", 3)
    monkeypatch.setattr(fleet_harness, "RAY", machine)
    go = tmp_path / "go"
    async with fleet_on(cluster, tmp_path) as fleet:
        await until(lambda: states(fleet) == ["ready"])
        request = ask(fleet, f"hold {go}")
        await until(lambda: fleet.active)
        (stopped,) = children()
        stopped.suspend()
        await until(lambda: "said nothing for 1 s" in fleet.health()[0]["reason"])
        go.touch()
        assert pid_of(await request) != stopped.pid
        await until(lambda: not stopped.is_running())


async def test_a_large_picture_and_a_large_splat_travel(
    cluster: Cluster, machine: psutil.Process, tmp_path: Path
) -> None:
    async with fleet_on(cluster, tmp_path) as fleet:
        await until(lambda: states(fleet) == ["ready"])
        data = os.urandom(30_000_000)  # a splat of 500,000 Gaussians
        assert await fleet.call(partial(fleet_standin.echo, data=data)) == data


PARENT = """
import asyncio, sys
from pathlib import Path
from functools import partial
from generation.fleet.actors import ClusterFleet
from generation.fleet.cluster import connect
from tests.support import fleet_harness, fleet_standin
from tests.support.fleet_harness import ask, states
from tests.support.waiting import until

async def main():
    address, token, doing, folder = sys.argv[1:]
    settings = fleet_harness.settings(Path(folder))
    fleet = ClusterFleet(connect(address, Path(token)), partial(fleet_standin.resolve, settings), 8,
                         "tests.support.fleet_standin:load")
    fleet.start()
    await until(lambda: states(fleet) == ["ready"])
    pid = await fleet.call(fleet_standin.pid)
    asked = ask(fleet, f"{doing} {folder}/path")
    await until(lambda: fleet.active or (Path(folder) / "path").exists())
    print(pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("doing", ["hold", "seize"])
def test_a_killed_service_leaves_no_engines_behind(
    head: tuple[str, psutil.Process], machine: psutil.Process, tmp_path: Path, doing: str
) -> None:
    """Whatever they do, even when no thread of theirs can run Python any more: then a GPU hangs."""
    command = [sys.executable, "-c", PARENT, head[0], str(ray_head.token_file()), doing, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    wait_until(lambda: not psutil.pid_exists(pid))


CONNECT = """
import sys
from pathlib import Path
from generation.fleet.cluster import ClusterError, connect
try:
    connect(sys.argv[1], Path(sys.argv[2]))
except ClusterError as error:
    print(error)
"""


def test_another_token_is_refused_and_none_is_told(
    head: tuple[str, psutil.Process], machine: psutil.Process, tmp_path: Path
) -> None:
    address, process = head
    other = tmp_path / "token"
    other.touch(mode=0o600)
    other.write_text("another-token-" * 3)
    said = subprocess.run(
        [sys.executable, "-c", CONNECT, address, str(other)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert said.stdout == f"the Ray cluster at {address} can not be joined: its token is not the one in {other}\n"
    token = ray_head.token_file().read_text()
    folder = next(each.partition("=")[2] for each in process.cmdline() if each.startswith("--temp-dir="))
    logs = [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "gcs_server.out" for path in logs)
    assert not any(token.encode() in path.read_bytes() for path in logs)
    assert "another-token" not in said.stdout + said.stderr
    family = [each for top in (process, machine) for each in (top, *top.children(recursive=True))]
    assert len(family) > 4
    assert not any(token in " ".join(each.cmdline()) for each in family)
    servers = [each for each in family if each.name() in ("gcs_server", "raylet")]
    assert len(servers) == 3
    assert all(each.environ()["RAY_AUTH_MODE"] == "token" for each in servers)
