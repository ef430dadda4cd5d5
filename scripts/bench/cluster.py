"""What an engine on a Ray cluster costs beside one in a process of this machine, and what a second machine gives.

Without models: requests are answered at once by a stand-in, with a splat of 28 MB or none, and then by one that sleeps.
So what is measured is start-up without weights, the way of a request, and sharing out; it says nothing about a GPU.

Without --address a cluster of one machine is started here, and "two engines" are two on it. With it, run this on the
cluster's head: the two are on two of its machines where it has so many.

    python -m scripts.bench.cluster [--address HOST:PORT] [--token-file PATH] [--seconds 4] [--requests 32]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from generation.fleet.actors import ActorEngine
from generation.fleet.cluster import Cluster, Machine, connect
from generation.fleet.fleet import Fleet, Form
from generation.fleet.messages import Resolve
from generation.fleet.process import ProcessEngine
from generation.fleet.ray_environment import ENGINE, environment
from generation.schema.results import Asset, Report, Request
from scripts.bench.fleet import STAND_IN_PLY, measure, stand_in_settings

WARM_UP, MEASURED = 10, 100
READY_S = 60.0
HEAD_S = 60.0


class Instant:
    """Answers in the first tick, with a splat of so many bytes."""

    models: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, size: int) -> None:
        self._ply = STAND_IN_PLY[:size]
        self.limit = SimpleNamespace(current=64)

    def begin(self, request: Request, *_: Callable[..., object]) -> Any:
        return SimpleNamespace(request=request, outcome=None)

    def tick(self, jobs: list[Any]) -> None:
        for job in jobs:
            job.outcome = Asset(self._ply, Report(job.request.seed))


def load_instant(settings: Any, progress: Callable[[str], None]) -> Instant:
    return Instant(settings.stand_in_bytes)


def instant_settings(size: int) -> Any:
    return SimpleNamespace(models=SimpleNamespace(max_batch=4), max_queue=8, device="cpu", stand_in_bytes=size)


def actors_on(cluster: Cluster, machines: Sequence[Machine]) -> Form:
    """Engines on these machines, one after the other."""
    turns = itertools.cycle(machines)

    def make(device: str, settings: Any, loader: str, changed: Callable[[], None]) -> ActorEngine:
        machine = next(turns)
        threads = max(1, machine.cores // machine.engines)
        first = Resolve(partial(copy, settings), loader, threads)
        return ActorEngine(device, cluster, machine, first, lambda settings: "", changed)

    return make


async def overhead(form: Form, size: int) -> tuple[float, list[float]]:
    """Seconds until an engine is ready, and of each of MEASURED requests, one after the other."""
    fleet = Fleet({"bench": instant_settings(size)}, "scripts.bench.cluster:load_instant", form)
    began = time.perf_counter()
    fleet.start()
    try:
        while fleet.status != "ready":
            if time.perf_counter() - began > READY_S:
                raise SystemExit(f"no engine: {fleet.reason}")
            await asyncio.sleep(0.005)
        ready = time.perf_counter() - began
        taken = []
        for number in range(WARM_UP + MEASURED):
            before = time.perf_counter()
            await fleet.generate(Request(prompt="a red cube", seed=number, threshold=0.0))
            taken.append(time.perf_counter() - before)
        return ready, taken[WARM_UP:]
    finally:
        await asyncio.to_thread(fleet.stop, 30)


@contextmanager
def head_here(gpus: int = 0) -> Iterator[tuple[str, Path]]:
    """A cluster of this machine alone, with an engine on each of its GPUs, or two without one: its address and token
    file.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
        "--node-ip-address=127.0.0.1", f"--num-gpus={gpus}", f"--resources={json.dumps({ENGINE: 2})}",
        "--object-store-memory=200000000", "--include-dashboard=false", "--include-log-monitor=false", "--no-monitor",
        "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}",
    ]  # fmt: skip
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, env=environment(token), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + HEAD_S
        while b"runtime started" not in (folder / "output").read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit((folder / "output").read_text())
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", token
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run(cluster: Cluster, seconds: float, requests: int, in_flight: int) -> None:
    machines = cluster.machines()
    places = [each for each in machines for _ in range(each.engines)]
    if not places:
        raise SystemExit("no machine of the cluster has an engine")
    apart = len(machines) > 1
    pair = machines[:2] if apart else places[:2]
    print(
        f"{os.cpu_count()} cores here; engines: {', '.join(f'{each.engines} on {each.address}' for each in machines)}"
    )
    forms = {
        "process": ProcessEngine,
        **{f"actor on {each.address}": actors_on(cluster, [each]) for each in machines[:2]},
    }
    for name, form in forms.items():
        for size in (0, len(STAND_IN_PLY)):
            ready, taken = asyncio.run(overhead(form, size))
            taken.sort()
            print(f"{name}, splats of {size / 1e6:.0f} MB: ready after {ready:.2f} s; a request takes "
                  f"{1e3 * statistics.median(taken):.1f} ms (median of {MEASURED}; "
                  f"{1e3 * taken[len(taken) * 9 // 10]:.1f} ms for nine of ten)", flush=True)  # fmt: skip
    if len(pair) < 2:
        print("no second engine to share with")
        return
    hourly = []
    for devices in (["1"], ["1", "2"]):
        form = actors_on(cluster, pair)
        hourly.append(
            asyncio.run(
                measure(
                    devices, stand_in_settings(seconds), "scripts.bench.fleet:load_stand_in", requests, in_flight, form
                )
            )
        )
    where = "on two machines" if apart else "on this one machine"
    print(f"two engines {where} give {hourly[1] / hourly[0]:.2f} times the throughput of one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", metavar="HOST:PORT", help="of a running cluster's head")
    parser.add_argument("--token-file", type=Path, default=Path("~/.404gen/cluster_token"), metavar="PATH")
    parser.add_argument("--seconds", type=float, default=4.0, help="that the sleeping stand-in takes for a request")
    parser.add_argument("--requests", type=int, default=32, help="of it; best a multiple of --in-flight")
    parser.add_argument("--in-flight", type=int, default=8, help="enough to fill both engines")
    args = parser.parse_args()
    options = (args.seconds, args.requests, args.in_flight)
    if args.address:
        run(connect(args.address, args.token_file), *options)
    else:
        with head_here() as (address, token):
            cluster = connect(address, token)
            run(cluster, *options)
            cluster.close()


if __name__ == "__main__":
    main()
