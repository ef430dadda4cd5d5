"""A Ray cluster of one machine for tests: its head, started as ``deploy_competitive.sh`` starts one, but on free ports.

It ends with what it was started for, and so do all its processes. Its folder is short: it holds sockets.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil

from generation.fleet.actors import ActorEngine
from generation.fleet.cluster import Cluster, connect
from generation.fleet.messages import Resolve
from generation.fleet.ray_environment import ENGINE, environment
from tests.support import fleet_standin
from tests.support.service_harness import wait_until

RAY = str(Path(sys.executable).with_name("ray"))
STORE_BYTES = 100_000_000
STOP_S = 10.0


@cache
def token_file() -> Path:
    """One for all clusters of this process: Ray reads it once."""
    path = Path(tempfile.mkdtemp(prefix="token-")) / "cluster_token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


@contextmanager
def node(*arguments: str, engines: int, gpus: int = 0) -> Iterator[psutil.Process]:
    """``ray start`` with these arguments, and all that it starts. ``gpus``: as many as Ray is told that there are."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    command = [
        RAY, "start", "--block", *arguments, "--num-cpus=2", f"--num-gpus={gpus}", "--include-log-monitor=false",
        f"--object-store-memory={STORE_BYTES}", f"--resources={json.dumps({ENGINE: engines})}", "--disable-usage-stats",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    temporary = [f"--temp-dir={folder}"] if "--head" in arguments else []
    with (folder / "output").open("wb") as output:
        process = psutil.Popen(
            [*command, *temporary],
            env=environment(token_file()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: b"runtime started" in (folder / "output").read_bytes() or process.poll() is not None)
        assert process.poll() is None, (folder / "output").read_text()
        yield process
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        finally:
            for each in family:
                if each.is_running():
                    each.kill()
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def head(engines: int = 2) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and the process that the cluster's are descendants of."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with node(
        "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false", engines=engines
    ) as process:
        yield f"127.0.0.1:{port}", process


@contextmanager
def joined(address: str) -> Iterator[Cluster]:
    """This process as one of the cluster's."""
    before = dict(os.environ)
    cluster = connect(address, token_file())
    try:
        yield cluster
    finally:
        cluster.close()
        os.environ.clear()
        os.environ.update(before)


def actor_of(cluster: Cluster, device: str, settings: Any, loader: str, changed: Any) -> ActorEngine:
    """An engine on the cluster's first machine."""
    first = Resolve(partial(fleet_standin.resolve, settings), loader, threads=1)
    return ActorEngine(device, cluster, cluster.machines()[0], first, lambda settings: "", changed)
