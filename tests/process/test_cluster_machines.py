"""A fleet over two machines of a Ray cluster, in network namespaces: spreading, and what becomes of requests when an
engine, a machine, its cable or the service goes. Around a stand-in pipeline; Ray and its keeper are the real ones.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from generation.fleet import ray_environment
from scripts.ops import cluster
from scripts.ops.processes import Refused
from tests.support import machines
from tests.support.machines import Machine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HEAD = ("10.77.0.1", 6379)
PATIENCE_S = 120.0
NUMBERS = itertools.count()
if why := machines.impossible():
    if os.environ.get("CLUSTER_MACHINES") == "required":
        pytest.fail(why, pytrace=False)
    pytest.skip(why, allow_module_level=True)


def start_ray(machine: Machine) -> None:
    """As deploy_competitive.sh does, keeper and all."""
    is_head = machine.address == HEAD[0]
    up, log = machine.home / "up", machine.home / "ray.log"
    up.touch()
    words = cluster.ray_arguments(HEAD, machine.address, is_head, 0 if is_head else 1)
    given = {"PATH": os.environ["PATH"], "HOME": str(machine.home)}
    keeper = [sys.executable, str(ROOT / "scripts/ops/keep_running.py"), str(up), str(log)]
    machine.start(
        *keeper, sys.executable, "-m", "ray.scripts.scripts", *words,
        environment=ray_environment.environment(machine.home / "token", given),
        stdout=(machine.home / "out").open("wb"),
    )  # fmt: skip


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)


class Service:
    """The fleet on the head, and what it has said."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.folder = folder
        self.engines: dict[str, list[Any]] = {}
        self._answers: dict[int, dict[str, Any]] = {}
        self._seed = 0
        driver = [sys.executable, "-m", "tests.support.cluster_driver", f"{HEAD[0]}:{HEAD[1]}"]
        self.process = machine.start(
            *driver, str(machine.home / "token"), str(folder), cwd=ROOT, stdout=subprocess.PIPE
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith(b"{"):
                sys.stderr.buffer.write(line)
                continue
            message = json.loads(line)
            if "engines" in message:
                self.engines = message["engines"]
            else:
                self._answers[message["seed"]] = message

    def ask(self, prompt: str, times: int = 1) -> list[int]:
        assert self.process.stdin is not None
        seeds = list(range(self._seed, self._seed + times))
        self._seed += times
        for seed in seeds:
            self.process.stdin.write(json.dumps({"ask": prompt, "seed": seed}).encode() + b"\n")
        self.process.stdin.flush()
        return seeds

    def answers(self, seeds: list[int]) -> list[dict[str, Any]]:
        """All of them; none is an error."""
        wait_for(lambda: all(seed in self._answers for seed in seeds), f"answers, engines {self.engines}")
        found = [self._answers[seed] for seed in seeds]
        assert not [answer for answer in found if "error" in answer]
        return found

    def wait_until_ready(self, *machines: Machine) -> None:
        devices = {f"{machine.address}/cpu0" for machine in machines}
        wait_for(
            lambda: {device for device, told in self.engines.items() if told[0] == "ready"} == devices,
            f"{devices} ready, of {self.engines}",
        )

    def hold(self) -> tuple[Path, list[int]]:
        """Two requests on each machine, and two that wait, until the file is there."""
        go = self.folder / f"go-{next(NUMBERS)}"
        seeds = self.ask(f"hold {go}", 6)
        wait_for(lambda: [told[1] for told in self.engines.values()] == [2, 2], f"two on each: {self.engines}")
        return go, seeds

    def pid_on(self, machine: Machine) -> int:
        """The engine's, as that machine counts."""
        go, seeds = self.hold()  # else the other machine may answer them all
        go.touch()
        answers = self.answers(seeds)
        return next(answer["pid"] for answer in answers if answer["device"].startswith(f"{machine.address}/"))

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)


class Rig:
    def __init__(self, network: machines.Network) -> None:
        self.head = network.add("head", HEAD[0])
        self.a, self.b = network.add("a", "10.77.0.2"), network.add("b", "10.77.0.3")
        cluster.make_token(self.head.home / "token")
        for machine in (self.a, self.b):
            cluster.make_token(machine.home / "token")
            (machine.home / "token").write_text((self.head.home / "token").read_text())
        for machine in (self.head, self.a, self.b):
            start_ray(machine)
        wait_for(lambda: "Ray runtime started" in (self.b.home / "out").read_text(), "Ray on all machines")
        self.folder = network.folder
        self.service = Service(self.head, self.folder)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with machines.network(tmp_path_factory.mktemp("machines")) as network:
        yield Rig(network)


@pytest.fixture
def service(rig: Rig) -> Service:
    rig.service.wait_until_ready(rig.a, rig.b)
    return rig.service


def others(machine: Machine, answers: list[dict[str, Any]]) -> list[str]:
    return [answer["device"] for answer in answers if not answer["device"].startswith(f"{machine.address}/")]


def test_requests_spread_over_both_machines(rig: Rig, service: Service) -> None:
    go, seeds = service.hold()
    go.touch()
    devices = [answer["device"] for answer in service.answers(seeds)]
    assert {device: devices.count(device) >= 2 for device in devices} == {
        "10.77.0.2/cpu0": True,
        "10.77.0.3/cpu0": True,
    }


def test_a_killed_engine_loses_nothing_and_comes_back(rig: Rig, service: Service) -> None:
    pid = service.pid_on(rig.a)
    go, seeds = service.hold()
    rig.a.run("kill", "-KILL", str(pid))
    wait_for(lambda: service.engines["10.77.0.2/cpu0"][0] != "ready", "the engine's end is noticed")
    go.touch()
    service.answers(seeds)
    service.wait_until_ready(rig.a, rig.b)
    assert service.pid_on(rig.a) != pid


def test_a_stopped_engine_is_replaced(rig: Rig, service: Service) -> None:
    pid = service.pid_on(rig.a)
    go, seeds = service.hold()
    rig.a.run("kill", "-STOP", str(pid))
    go.touch()
    assert len(others(rig.a, service.answers(seeds))) == 6
    service.wait_until_ready(rig.a, rig.b)
    assert service.pid_on(rig.a) != pid


def test_a_killed_machine_loses_nothing_and_comes_back(rig: Rig, service: Service) -> None:
    go, seeds = service.hold()
    rig.b.kill()
    go.touch()
    assert len(others(rig.b, service.answers(seeds))) == 6
    wait_for(lambda: "10.77.0.3/cpu0" not in service.engines, "its engine is not listed any more")
    rig.b.boot()
    start_ray(rig.b)
    service.wait_until_ready(rig.a, rig.b)


def test_a_cut_cable_loses_nothing_and_the_machine_rejoins(rig: Rig, service: Service) -> None:
    go, seeds = service.hold()
    rig.b.cut()
    go.touch()
    assert len(others(rig.b, service.answers(seeds))) == 6
    wait_for(lambda: "10.77.0.3/cpu0" not in service.engines, "its engine is not listed any more")
    rig.b.mend()  # Ray there learns that it was given up, and ends; its keeper starts it again
    service.wait_until_ready(rig.a, rig.b)


def test_the_next_service_has_the_engines_of_one_that_was_killed(rig: Rig, service: Service) -> None:
    before = [service.pid_on(machine) for machine in (rig.a, rig.b)]  # each counts its own
    service.hold()
    rig.head.run("pkill", "-KILL", "-f", "tests.support.cluster_driver")
    service.process.wait(PATIENCE_S)
    rig.service = Service(rig.head, rig.folder)
    rig.service.wait_until_ready(rig.a, rig.b)
    for machine, pid in zip((rig.a, rig.b), before, strict=True):
        now = rig.service.pid_on(machine)
        assert now != pid
        assert machine.run("pgrep", "-f", "ray::EngineActor").stdout.split() == [str(now)]
    rig.service.stop()


def test_without_the_token_nobody_joins(rig: Rig) -> None:
    token = rig.b.home / "another"
    token.write_text("0" * 64 + "\n")
    token.chmod(stat.S_IRUSR | stat.S_IWUSR)
    words = ["start", "--block", f"--address={HEAD[0]}:{HEAD[1]}"]
    joining = {
        name: rig.b.start(
            sys.executable, "-m", "ray.scripts.scripts", *words,
            environment={**variables, "RAY_NUM_REDIS_GET_RETRIES": "2"}, stdout=(rig.b.home / name).open("wb"),
        )
        for name, variables in (
            ("wrong", ray_environment.environment(token, {"PATH": os.environ["PATH"]})),
            ("none", {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}),
        )
    }  # fmt: skip
    for name, process in joining.items():
        assert process.wait(PATIENCE_S) == 1
        assert "InvalidAuthToken" in (rig.b.home / name).read_text()
        with pytest.raises(Refused, match="does not take this machine's token"):
            cluster.wait_for_ray(rig.b.home / name, process.pid, token)


def test_the_token_stands_nowhere_but_in_its_file(rig: Rig) -> None:
    secret = (rig.head.home / "token").read_text().strip()
    for machine in (rig.head, rig.a, rig.b):
        commands = machine.run("ps", "axww", "-o", "args").stdout
        assert "raylet" in commands
        assert secret not in commands
        logs = [path for path in machine.home.iterdir() if path.name != "token"]
        seen = machine.run("grep", "--recursive", "--files-with-matches", secret, "/tmp/ray", *map(str, logs))
        assert (seen.returncode, seen.stdout) == (1, "")
