"""Throughput of the service's fleet with one engine and with two, in one run: requests an hour, and the ratio.

The models are the full profile's at their true size, with random weights (``scripts.bench.full_size``), or what another
loader gives; then two GPUs are needed. With --stand-in no models are run at all: each tick sleeps, so that what is
measured is the fleet's own share (processes, pipes and sharing out), and says nothing about a GPU.

    python -m scripts.bench.fleet [--in-flight 8] [--requests 32] [--loader MODULE:FUNCTION | --stand-in SECONDS]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from generation.fleet.fleet import Fleet, Form
from generation.fleet.process import ProcessEngine
from generation.schema.results import Asset, Report, Request

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


def full_settings() -> Any:
    from scripts.bench import full_size

    return full_size.settings().model_copy(update={"max_queue": 10_000})


async def finish(fleet: Fleet, requests: int, in_flight: int) -> float:
    """Seconds for so many requests, ``in_flight`` at every moment. Raises what the first one that fails does."""
    numbers: Iterator[int] = iter(range(requests))

    async def keep_busy() -> None:
        for number in numbers:  # shared: each takes the next
            await fleet.generate(Request(prompt=PROMPTS[number % len(PROMPTS)], seed=number, threshold=0.0))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(keep_busy())
    return time.perf_counter() - began


async def measure(
    devices: list[str], settings: Any, loader: str, requests: int, in_flight: int, form: Form = ProcessEngine
) -> float:
    """Requests an hour on these devices, warm."""
    fleet = Fleet(dict.fromkeys(devices, settings), loader, form)
    began = time.perf_counter()
    fleet.start()
    try:
        while (states := {each["status"] for each in fleet.health()}) != {"ready"}:
            if "failed" in states or time.perf_counter() - began > READY_S:
                raise SystemExit(f"the fleet can not be used: {fleet.reason}")
            await asyncio.sleep(0.05)
        print(f"engines: {len(devices)}, ready after {time.perf_counter() - began:.1f} s", flush=True)
        await finish(fleet, in_flight, in_flight)
        seconds = await finish(fleet, requests, in_flight)
        for each in fleet.health():
            print(
                f"  {each['device']} {each['name']}: ticks by requests in them {each['ticks']}, memory {each['memory']}"
            )
    finally:
        await asyncio.to_thread(fleet.stop, 30)
    hourly = 3600 * requests / seconds
    per_request = seconds / requests
    print(f"engines: {len(devices)}, {requests} requests, {in_flight} in flight, {seconds:.1f} s: "
          f"{per_request:.2f} s a request, {hourly:.0f} an hour", flush=True)  # fmt: skip
    return hourly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32, help="best a multiple of --in-flight")
    parser.add_argument("--in-flight", type=int, default=8, help="enough to fill both engines")
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--loader", default="scripts.bench.full_size:load", metavar="MODULE:FUNCTION")
    models.add_argument("--stand-in", type=float, metavar="SECONDS", help="no GPU, no models: this long for a request")
    args = parser.parse_args()
    if args.stand_in is None:
        settings, loader, devices = full_settings(), args.loader, ["cuda:0", "cuda:1"]
    else:
        settings, loader, devices = stand_in_settings(args.stand_in), "scripts.bench.fleet:load_stand_in", ["1", "2"]
        print(
            f"STAND-IN: no GPU and no models; a request takes {args.stand_in} s of sleep, as up to {STAND_IN_BATCH} do"
        )
    one, two = (
        asyncio.run(measure(some, settings, loader, args.requests, args.in_flight)) for some in (devices[:1], devices)
    )
    print(f"two engines give {two / one:.2f} times the throughput of one")


if __name__ == "__main__":
    main()
