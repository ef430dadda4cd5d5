"""Throughput of the service's fleet with one engine and with two, in one run: requests an hour, and the ratio.

The models are the full profile's at their true size, with random weights (``scripts.bench.full_size``), or what another
loader gives; then two GPUs are needed. With --stand-in no models are run at all: each tick sleeps, so that what is
measured is the fleet's own share (processes, pipes and sharing out), and says nothing about a GPU.

Engines are processes, or with --ray actors on a Ray cluster that is started here. With --kill the same requests are
made once more by two engines, of which one is killed when half of them are answered: all of them must be.

    python -m scripts.bench.fleet [--in-flight 8] [--requests 32] [--loader MODULE:FUNCTION | --stand-in SECONDS]
        [--config configs/lgm.yaml] [--ray] [--engines 1 2] [--kill] [--json figures.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from generation.fleet.fleet import Fleet, Form
from generation.fleet.process import ProcessEngine
from generation.schema.results import Asset, Report, Request
from generation.web.metrics import Metrics

PROMPTS = ("a red cube", "a blue chair", "a green mug", "a yellow house", "a purple mushroom", "a white rocket")
STAND_IN_BATCH, STAND_IN_TICKS = 4, 250
STAND_IN_PLY = bytes(28_000_000)  # of 500,000 Gaussians
READY_S = 1200


class StandIn:
    """Takes a number of seconds for a request, alone or beside others, as a GPU bound by kernel launches does."""

    models: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.limit = SimpleNamespace(current=STAND_IN_BATCH)

    def begin(self, request: Request, *_: Callable[..., object]) -> Any:
        return SimpleNamespace(request=request, ticks=0, outcome=None)

    def tick(self, jobs: list[Any]) -> None:
        time.sleep(self._seconds / STAND_IN_TICKS)
        for job in jobs:
            job.ticks += 1
            if job.ticks == STAND_IN_TICKS:
                job.outcome = Asset(STAND_IN_PLY, Report(job.request.seed))


def load_stand_in(settings: Any, progress: Callable[[str], None]) -> StandIn:
    return StandIn(settings.stand_in)


def stand_in_settings(seconds: float) -> Any:
    models = SimpleNamespace(max_batch=STAND_IN_BATCH)
    return SimpleNamespace(models=models, max_queue=10_000, device="cpu", stand_in=seconds)


def full_settings(config: Path | None = None) -> Any:
    from scripts.bench import full_size

    return full_size.settings(config=config).model_copy(update={"max_queue": 10_000})


def process_of(pipeline: Any) -> int:
    """The engine's process. For ``Fleet.call``."""
    return os.getpid()


async def finish(fleet: Fleet, requests: int, in_flight: int, halfway: Callable[[], object] = lambda: None) -> float:
    """Seconds for so many requests, ``in_flight`` at every moment. Raises what the first one that fails does.

    ``halfway`` is called when half of them are answered.
    """
    numbers: Iterator[int] = iter(range(requests))
    answered = 0

    async def keep_busy() -> None:
        nonlocal answered
        for number in numbers:  # shared: each takes the next
            await fleet.generate(Request(prompt=PROMPTS[number % len(PROMPTS)], seed=number, threshold=0.0))
            answered += 1
            if answered == requests // 2:
                halfway()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(keep_busy())
    return time.perf_counter() - began


async def measure(
    devices: list[str],
    settings: Any,
    loader: str,
    requests: int,
    in_flight: int,
    form: Form = ProcessEngine,
    kill: bool = False,
    tell: Callable[[dict[str, Any]], object] = lambda figures: None,
) -> float:
    """Requests an hour on these devices, warm. ``tell`` gets all figures, as soon as there are some.

    ``kill``: then the same requests again, while one of the engines is killed. Raises what a request that fails does.
    """
    fleet = Fleet(dict.fromkeys(devices, settings), loader, form)
    began = time.perf_counter()
    fleet.start()
    try:
        while (states := {each["status"] for each in fleet.health()}) != {"ready"}:
            if "failed" in states or time.perf_counter() - began > READY_S:
                raise SystemExit(f"the fleet can not be used: {fleet.reason}")
            await asyncio.sleep(0.05)
        ready = time.perf_counter() - began
        print(f"engines: {len(devices)}, ready after {ready:.1f} s", flush=True)
        await finish(fleet, len(devices) * settings.models.max_batch, in_flight)
        seconds = await finish(fleet, requests, in_flight)
        hourly = 3600 * requests / seconds
        per_request = seconds / requests
        print(f"engines: {len(devices)}, {requests} requests, {in_flight} in flight, {seconds:.1f} s: "
              f"{per_request:.2f} s a request, {hourly:.0f} an hour", flush=True)  # fmt: skip
        health = fleet.health()
        for each in health:
            print(
                f"  {each['device']} {each['name']}: ticks by requests in them {each['ticks']}, memory {each['memory']}"
            )
        figures = {
            "engines": len(devices), "ready_s": ready, "requests": requests, "in_flight": in_flight,
            "seconds": seconds, "per_hour": hourly, "health": health, "metrics": Metrics(fleet).render().decode(),
        }  # fmt: skip
        tell(figures)
        if kill:
            # By its module's name, not __main__'s: the engine has to find it.
            from scripts.bench.fleet import process_of

            process = await fleet.call(process_of)
            seconds = await finish(fleet, requests, in_flight, lambda: os.kill(process, signal.SIGKILL))
            health = fleet.health()
            print(f"engines: {len(devices)}, one killed halfway: all of {requests} requests answered in {seconds:.1f} "
                  f"s; now {[each['status'] for each in health]}", flush=True)  # fmt: skip
            tell(figures | {"killed": {"answered": requests, "seconds": seconds, "health": health}})
    finally:
        await asyncio.to_thread(fleet.stop, 30)
    return hourly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32, help="best a multiple of --in-flight")
    parser.add_argument("--in-flight", type=int, default=8, help="enough to fill both engines")
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--loader", default="scripts.bench.full_size:load", metavar="MODULE:FUNCTION")
    models.add_argument("--stand-in", type=float, metavar="SECONDS", help="no GPU, no models: this long for a request")
    parser.add_argument("--config", type=Path, help="in place of the full profile's")
    parser.add_argument("--ray", action="store_true", help="actors on a Ray cluster, not processes")
    parser.add_argument("--engines", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="fleets to measure")
    parser.add_argument("--kill", action="store_true", help="with two engines also: one of them is killed halfway")
    parser.add_argument("--json", type=Path, help="write all figures there, after each")
    args = parser.parse_args()
    if args.stand_in is None:
        settings, loader, devices = full_settings(args.config), args.loader, ["cuda:0", "cuda:1"]
    else:
        settings, loader, devices = stand_in_settings(args.stand_in), "scripts.bench.fleet:load_stand_in", ["1", "2"]
        print(
            f"STAND-IN: no GPU and no models; a request takes {args.stand_in} s of sleep, as up to {STAND_IN_BATCH} do"
        )
    figures: dict[int, dict[str, Any]] = {}

    def tell(some: dict[str, Any]) -> None:
        figures[some["engines"]] = {"form": "ray" if args.ray else "process", "config": str(args.config), **some}
        if args.json:
            args.json.write_text(json.dumps(list(figures.values()), indent=1))

    with ExitStack() as stack:
        form: Form = ProcessEngine
        if args.ray:
            from scripts.bench import cluster

            gpus = max(args.engines) if args.stand_in is None else 0
            joined = cluster.connect(*stack.enter_context(cluster.head_here(gpus)))
            stack.callback(joined.close)
            form = cluster.actors_on(joined, joined.machines())
        hourly = {}
        for count in args.engines:
            kill = args.kill and count > 1
            work = measure(devices[:count], settings, loader, args.requests, args.in_flight, form, kill, tell)
            hourly[count] = asyncio.run(work)
    if len(hourly) > 1:
        print(f"two engines give {hourly[2] / hourly[1]:.2f} times the throughput of one")


if __name__ == "__main__":
    main()
