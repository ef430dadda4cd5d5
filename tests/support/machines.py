"""Machines on this machine: each with a network, processes, /dev/shm, /tmp/ray and a name of its own.

Linux namespaces, made by root with ``ip`` and ``unshare``. All addresses are inside them: nothing of this machine's own
network is touched. What a test leaves, however it ends, dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PREFIX = "machines"
SHM = "640m"
REAPER = "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"


def impossible() -> str:
    """Why there can be no machines here; empty where there can."""
    if missing := [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]:
        return f"no {missing[0]} here (iproute2, util-linux)"
    name = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespaces here: {made.stderr.strip()}"
    try:
        bridge = ["ip", "-n", name, "link", "add", "switch", "type", "bridge"]
        unshare = ["unshare", "--mount", "--pid", "--uts", "--fork", "--mount-proc", "true"]
        for command in (bridge, unshare):
            tried = subprocess.run(command, capture_output=True, text=True)
            if tried.returncode != 0:
                return f"no machines here: {tried.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Machine:
    """One machine. `boot` starts it, `kill` takes its power; what it had in memory is gone then, its `home` is not."""

    def __init__(self, network: Network, name: str, address: str, home: Path) -> None:
        self.name, self.address, self.home = name, address, home
        self._network = network
        self._namespace = network.namespace(name)
        self._cable = f"to-{name}"[:15]
        self._unshare: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)
        _ip("netns", "add", self._namespace)
        _ip("-n", self._namespace, "link", "set", "lo", "up")
        _ip("-n", self._namespace, "link", "add", "eth0", "type", "veth", "peer", self._cable, "netns", network.switch)
        _ip("-n", network.switch, "link", "set", self._cable, "master", "switch", "up")
        _ip("-n", self._namespace, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", self._namespace, "link", "set", "eth0", "up")

    def boot(self) -> None:
        mounts = f"mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && mount -t tmpfs -o size={SHM} tmpfs /dev/shm"
        script = f"{mounts} && hostname {self.name} && : > {self.home}/booted && {REAPER}"
        (self.home / "booted").unlink(missing_ok=True)
        apart = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        self._unshare = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace, *apart, "bash", "-c", script],
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
        )
        deadline = time.monotonic() + 20
        while not (self.home / "booted").exists():
            if self._unshare.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"machine {self.name} did not boot")
            time.sleep(0.01)

    @property
    def _first(self) -> str:
        """The process that everything on the machine dies with."""
        assert self._unshare is not None
        pid = self._unshare.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]

    def command(self, *words: str, cwd: Path = Path("/"), environment: Mapping[str, str] | None = None) -> list[str]:
        """To run here what is to run there."""
        variables = {"HOME": str(self.home), **(environment or {})}
        enter = ["nsenter", f"--target={self._first}", "--net", "--mount", "--pid", "--uts", "--ipc", f"--wdns={cwd}"]
        return [*enter, "env", *(f"{key}={value}" for key, value in variables.items()), *words]

    def run(self, *words: str, timeout: float = 60, **place: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words, **place), capture_output=True, text=True, timeout=timeout)

    def start(self, *words: str, stdout: Any = None, **place: Any) -> subprocess.Popen[bytes]:
        command = self.command(*words, **place)
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent
        )

    def cut(self) -> None:
        """Pulls its network cable: nothing that was sent arrives, and nobody is told."""
        _ip("-n", self._network.switch, "link", "set", self._cable, "down")

    def mend(self) -> None:
        _ip("-n", self._network.switch, "link", "set", self._cable, "up")

    def kill(self) -> None:
        if self._unshare is not None:
            first = Path("/proc", self._first)
            self._unshare.kill()  # and the first process with it
            self._unshare.wait()
            self._unshare = None
            while first.exists() and "Z" not in (first / "stat").read_text().rpartition(")")[2]:
                time.sleep(0.01)


class Network:
    """A switch, and the machines on its cables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: dict[str, Machine] = {}
        self.switch = self.namespace("switch")
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "switch", "up")

    def namespace(self, name: str) -> str:
        return f"{PREFIX}-{os.getpid()}-{name}"

    def add(self, name: str, address: str) -> Machine:
        """A machine that runs. Its folder outlives it."""
        machine = self.machines[name] = Machine(self, name, address, self.folder / name)
        machine.boot()
        return machine

    def close(self) -> None:
        for machine in self.machines.values():
            machine.kill()
        for name in ("switch", *self.machines):
            subprocess.run(["ip", "netns", "delete", self.namespace(name)], capture_output=True)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    _sweep()
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()


def _sweep() -> None:
    """Removes the names of namespaces whose test was killed."""
    for path in Path("/run/netns").glob(f"{PREFIX}-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            subprocess.run(["ip", "netns", "delete", path.name], capture_output=True)


def clone(root: Path, to: Path) -> None:
    """A copy of the project, with what is compiled in it. Its environment has the packages of this one."""
    private = shutil.ignore_patterns(".git", ".venv", ".cache", "data", "run", "logs", ".*_cache")
    shutil.copytree(root, to, ignore=private)
    packages = Path(sysconfig.get_path("purelib"))
    inside = to / ".venv" / packages.relative_to(sys.prefix)
    inside.parent.mkdir(parents=True)
    inside.symlink_to(packages)
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), to / ".venv/pyvenv.cfg")
    (to / ".venv/bin").mkdir()
    (to / ".venv/bin/python").symlink_to(Path(sys.executable).resolve())
    marks = (
        "from scripts.ops import environment as e\n"
        "for extra in ('miner', 'service', 'cluster'): e._mark(extra).write_text(e._key())"
    )
    subprocess.run([to / ".venv/bin/python", "-c", marks], cwd=to, check=True)
