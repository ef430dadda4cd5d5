"""A fleet of engines around the stand-in pipeline, for tests: starting it, watching it, asking it.

The engines are processes, or Ray actors where a test sets ``FORM`` and ``RAY``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from generation.fleet.fleet import Fleet, Form
from generation.fleet.process import ProcessEngine
from generation.schema.results import Request
from tests.support.waiting import until

PATIENCE_S = 120.0  # how long a test waits for what must happen
DEVICES = ("first", "second")
FORM: Form = ProcessEngine
RAY: psutil.Process | None = None  # whose descendants the actors are


def fleet_of(folder: Path, devices: tuple[str, ...] = DEVICES, **limits: int) -> Fleet:
    return Fleet(dict.fromkeys(devices, settings(folder, **limits)), "tests.support.fleet_standin:load", FORM)


def settings(folder: Path, max_queue: int = 3, max_batch: int = 2) -> Any:
    models = SimpleNamespace(max_batch=max_batch)
    values = {"models": models, "max_queue": max_queue, "broken": str(folder / "broken")}
    return SimpleNamespace(**values, device="cpu")


@asynccontextmanager
async def starting(folder: Path, devices: tuple[str, ...] = DEVICES, **limits: int) -> AsyncIterator[Fleet]:
    fleet = fleet_of(folder, devices, **limits)
    fleet.start()
    try:
        yield fleet
    finally:
        await asyncio.to_thread(fleet.stop, PATIENCE_S)
        if RAY is not None:  # it ends processes when it has said that they have ended
            await until(lambda: not children())
        assert children() == []


@asynccontextmanager
async def running(folder: Path, devices: tuple[str, ...] = DEVICES, **limits: int) -> AsyncIterator[Fleet]:
    async with starting(folder, devices, **limits) as fleet:
        await until(lambda: states(fleet) == ["ready"] * len(devices))
        yield fleet


def states(fleet: Fleet) -> list[str]:
    return [each["status"] for each in fleet.health()]


def children() -> list[psutil.Process]:
    """The engines' processes, the oldest first."""
    if RAY is not None:
        return [each for each in RAY.children(recursive=True) if _command(each)[0].startswith("ray::EngineActor")]
    return [each for each in psutil.Process().children() if "generation.fleet.worker" in _command(each)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [""]
    except psutil.Error:  # it has ended meanwhile
        return [""]


def ask(fleet: Fleet, prompt: str, seed: int = 1, background: bool = False) -> asyncio.Task[Any]:
    request = Request(prompt=prompt, seed=seed, threshold=0.6, background=background)
    return asyncio.create_task(fleet.generate(request))


def pid_of(asset: Any) -> int:
    return int(asset.ply.split()[0])
