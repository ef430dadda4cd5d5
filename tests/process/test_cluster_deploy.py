"""The README's cluster commands to the letter, on three machines that are network namespaces: the head with service,
rehearsal and miner, and two that join with a tiny engine each. One of them loses its power and comes back.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support import machines
from tests.support.machines import Machine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 180.0  # on two cores that load two engines at once
if why := machines.impossible():
    if os.environ.get("CLUSTER_MACHINES") == "required":
        pytest.fail(why, pytrace=False)
    pytest.skip(why, allow_module_level=True)


def wait_for(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {PATIENCE_S:.0f} s"
        time.sleep(0.2)
    print(time.strftime("%X"), what, flush=True)


class Cluster:
    def __init__(self, network: machines.Network) -> None:
        self.head = network.add("head", "10.0.0.1")
        self.workers = [network.add("a", "10.0.0.2"), network.add("b", "10.0.0.3")]
        for machine in (self.head, *self.workers):
            machines.clone(ROOT, machine.home / "miner")
        # There is no sshd on them: what it would do over there.
        ssh = self.head.home / "bin/ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/bash\ncd "{network.folder}/$1" && HOME=$PWD exec bash -c "$2"\n')
        ssh.chmod(0o755)

    def start(self, machine: Machine, command: str) -> subprocess.Popen[bytes]:
        """A line of the README, typed there."""
        variables = {"PATH": f"{self.head.home}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        out = (machine.home / "out").open("ab")
        words = ("bash", "-c", command)
        return machine.start(*words, cwd=machine.home / "miner", environment=variables, stdout=out)

    def run(self, machine: Machine, command: str) -> None:
        assert self.start(machine, command).wait(PATIENCE_S) == 0, (machine.home / "out").read_text()

    def engines(self) -> dict[str, str]:
        """By machine: what /health says of its engine."""
        ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:10006/health').read().decode())"
        answer = self.head.run("python3", "-c", ask).stdout
        told = json.loads(answer)["engines"] if answer else []
        return {each["machine"]: f"{each['status']}, {len(each['active'])} requests" for each in told}

    def tasks(self, table: str, outcome: str) -> set[str]:
        path = self.head.home / "miner/data/rehearsal/ledger.sqlite"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
            rows: list[Any] = ledger.execute(f"SELECT task_id FROM {table} WHERE outcome = ?", (outcome,)).fetchall()
        return {row[0] for row in rows}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with machines.network(tmp_path) as network:
        made = Cluster(network)
        yield made
        for machine in (made.head, *made.workers):
            print(f"---- {machine.name}", (machine.home / "out").read_text(), sep="\n")


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Several machines as one")[1]
    found = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1].splitlines()


def test_the_readmes_commands_and_a_machine_that_goes_and_comes_back(cluster: Cluster) -> None:
    on_head, copy_token, join = commands()
    head, (a, b) = cluster.head, cluster.workers
    deploying = cluster.start(head, on_head)
    wait_for(lambda: "--join 10.0.0.1:6379" in (head.home / "out").read_text(), "the head says how to join")
    for machine in (a, b):
        cluster.run(head, copy_token.replace("MACHINE", machine.name))
    joining = [cluster.start(machine, join) for machine in (a, b)]
    assert [process.wait(PATIENCE_S) for process in joining] == [0, 0]
    assert deploying.wait(PATIENCE_S) == 0
    wait_for(lambda: all(each in cluster.engines() for each in ("10.0.0.2", "10.0.0.3")), "both have joined")
    wait_for(lambda: len(cluster.tasks("submissions", "accepted")) >= 2, "two results are accepted")

    wait_for(lambda: re.match("ready, [1-9]", cluster.engines()["10.0.0.3"]), "b works on something")
    b.cut()
    b.kill()
    before = cluster.tasks("pulls", "task")
    wait_for(lambda: set(cluster.engines()) == {"10.0.0.2"}, "its engine is not listed any more")
    b.mend()
    b.boot()
    cluster.run(b, join)
    wait_for(lambda: cluster.engines().get("10.0.0.3", "").startswith("ready"), "its engine is back")
    wait_for(lambda: before <= cluster.tasks("submissions", "accepted"), "all tasks of before are accepted")
    for table, outcome in (("generations", "failed"), ("submissions", "declined"), ("submissions", "broken")):
        assert cluster.tasks(table, outcome) == set()
    cluster.run(a, "./stop_competitive.sh")
    left = a.run("ps", "axww", "-o", "args").stdout
    assert not re.search(r"raylet|EngineActor|keep_running", left), left
