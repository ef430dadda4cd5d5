"""Stands in for the models in an engine's process: what a request does to its engine is in the prompt.

It shows what a fleet makes of engines that work, fail and die; it says nothing about a GPU.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from generation.schema.results import Asset, Report, Request


class Pipeline:
    """Prompts are "WORD [PATH]". ``hold``: takes ticks until PATH is there. ``hang``: never comes back, the first time
    that PATH is not there. ``seize``: the same, in C and with Python's lock held. ``die``: ends the process, the first
    time that PATH is not there. ``cuda``: a CUDA error, the same. ``host``: the machine's memory is full outside of a
    tick, the same. ``always``: a CUDA error. ``memory``: out of memory. ``crash``: some other error. ``reject``: no
    splat. Anything else is made at once.
    """

    models = [{"name": "stand-in", "revision": "1", "licence": "MIT", "device": "cpu"}]  # noqa: RUF012
    limit = SimpleNamespace(current=64)  # what memory allows

    def begin(
        self,
        request: Request,
        progress: Callable[[str, float], None],
        cancelled: Callable[[], bool],
        paused: Callable[[], bool],
    ) -> Any:
        word, _, path = (request.prompt or "image").partition(" ")
        if word == "host" and not Path(path).exists():
            Path(path).touch()
            raise MemoryError
        return SimpleNamespace(request=request, progress=progress, cancelled=cancelled, paused=paused, outcome=None)

    def tick(self, jobs: list[Any]) -> None:
        for job in jobs:
            if job.paused():
                job.progress("paused", 0.0)
                continue
            job.progress("dreamgaussian", 0.25)
            try:
                job.outcome = self._one(job)
            except Exception as error:
                job.outcome = error

    def _one(self, job: Any) -> Asset | None:
        request: Request = job.request
        word, _, path = (request.prompt or "image").partition(" ")
        report = Report(request.seed, score=0.75, num_gaussians=9000, seconds={"dreamgaussian": 1.5})
        if word == "hold" and not Path(path).exists():
            if job.cancelled():
                Path(path).with_suffix(".cancelled").touch()
                raise RuntimeError("given up")
            return None
        if word == "hang" and not Path(path).exists():
            Path(path).touch()
            threading.Event().wait()
        if word == "seize":
            Path(path).touch()
            ctypes.PyDLL(None).sleep(600)
        if word in ("die", "cuda") and not Path(path).exists():
            Path(path).touch()
            if word == "die":
                os.kill(os.getpid(), 9)
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        if word == "always":
            raise RuntimeError("CUDA error: unspecified launch failure")
        if word == "memory":
            raise RuntimeError("CUDA error: out of memory")
        if word == "crash":
            raise RuntimeError("the stage broke")
        if word == "reject":
            report.rejected = "CLIP score 0.21 is under 0.6"
            return Asset(b"", report)
        if request.image is not None:
            word = f"{request.image.mode} {request.image.size}"
        if request.target is not None:
            word += f" {request.target.mode} {request.target.size}"
        return Asset(f"{os.getpid()} {word} {request.seed}".encode(), report, gaussians=object())  # type: ignore[arg-type]

    def validate(self, ply: bytes, prompt: Any, single: bool, grid: bool, above: float) -> Any:
        raise ValueError("not a PLY")


def load(settings: Any, progress: Callable[[str], None]) -> Pipeline:
    """``settings.broken`` is the path of a file; while it is there, loading fails: in the way that it says."""
    progress("a stand-in")
    if Path(settings.broken).exists():
        if (way := Path(settings.broken).read_text()) == "hang":
            threading.Event().wait()
        if way == "exit":
            raise SystemExit(3)
        raise OSError("flux.1-schnell is not on this machine")
    return Pipeline()


def resolve(settings: Any) -> Any:
    """On a cluster's machine."""
    return settings


def resolve_there(settings: Any) -> Any:
    """The same with what only that machine can say."""
    return SimpleNamespace(**vars(settings), profile="tiny", memory_class="24 GB", process=os.getpid())


def variable(pipeline: Pipeline, name: str) -> str:
    return os.environ[name]


def echo(pipeline: Pipeline, data: bytes) -> bytes:
    return data


def pid(pipeline: Pipeline) -> int:
    return os.getpid()


def parse(pipeline: Pipeline, text: str) -> int:
    return int(text)
