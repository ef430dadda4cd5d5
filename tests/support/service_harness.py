"""The real HTTP service around a stand-in pipeline that tests can hold, fail and watch."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn

from generation.engine.engine import Engine
from generation.fleet.fleet import Fleet
from generation.pipeline.pipeline import Asset, Cancelled, GateResult, Job, Report, Request, Scores
from generation.serve_competitive import Server, listen
from generation.web.app import create_app

PATIENCE_S = 120.0  # how long a test waits for what must happen; only a failing test waits that long


class StandInPipeline:
    """Makes ``ply\\n<prompt> <seed>``. Other prompts: "hold" (takes ticks until ``go``), "crash", "exit", "reject"."""

    models = [{"name": "stand-in", "revision": "1", "licence": "MIT", "device": "cpu"}]  # noqa: RUF012
    limit = SimpleNamespace(current=64)  # what memory allows

    def __init__(self) -> None:
        self.go = threading.Event()
        self.started: list[Request] = []
        self.ticks: list[list[str | None]] = []
        self.cancelled: list[str | None] = []
        self.validated: list[tuple[bytes, Any]] = []
        self.on_validate: Callable[[], Any] = lambda: None

    def begin(
        self,
        request: Request,
        progress: Callable[[str, float], None],
        cancelled: Callable[[], bool],
        paused: Callable[[], bool],
    ) -> Job:
        self.started.append(request)
        return Job(request, progress, cancelled, Report(request.seed), paused)

    def tick(self, jobs: list[Job]) -> None:
        running = [job for job in jobs if not job.paused()]
        self.ticks.append([job.request.prompt for job in running])
        for job in jobs:
            if job in running:
                job.outcome = self._one(job)
            else:
                job.pause()

    def _one(self, job: Job) -> Asset | Exception | None:
        request = job.request
        job.progress("text_to_image", 0.5)
        if request.prompt == "crash":
            return RuntimeError("the stage broke\nERROR forged")
        if request.prompt == "exit":
            raise SystemExit(3)
        if request.prompt == "reject":
            return Asset(
                b"", Report(request.seed, score=0.21, rejected="CLIP score 0.21 is under 0.6 \u2014\nX-Evil: 1")
            )
        if request.prompt == "nothing":
            return Asset(b"", Report(request.seed, rejected="nothing stands out", hopeless=True))
        if request.prompt == "long":
            return Asset(b"ply", Report(request.seed, score=0.7, text_cut={"mvdream": (77, 90)}))
        if request.prompt == "hold" and not self.go.wait(0.005):
            if not job.cancelled():
                return None
            self.cancelled.append(request.prompt)
            return Cancelled("given up")
        job.progress("dreamgaussian", 0.25)
        what = request.prompt if request.image is None else f"{request.image.mode} {request.image.size}"
        seconds = {"text_to_image": 0.25, "dreamgaussian": 1.5}
        parts = {"iqa": 0.8, "alignment": 0.6, "ssim": 0.9, "lpips": None}
        report = Report(request.seed, score=0.7654, parts=parts, num_gaussians=9000, seconds=seconds)
        return Asset(f"ply\n{what} {request.seed}".encode(), report)

    def validate(self, ply: bytes, prompt: Any, single: bool, grid: bool, above: float) -> Scores:
        self.validated.append((ply, prompt))
        self.on_validate()
        if not ply.startswith(b"ply"):
            raise ValueError("not a PLY")
        gates = {"finite": GateResult(False, float("inf"), 0.0)}
        shown = above < 0.8
        return Scores(
            score=0.8, alignment_score=0.75, iqa=None, ssim=0.9, lpips=0.1, gates=gates,
            preview=b"one" if single and shown else None, grid_preview=b"four" if grid and shown else None,
        )  # fmt: skip


class Service:
    def __init__(self, engine: Engine, pipeline: StandInPipeline, server: uvicorn.Server, url: str) -> None:
        self.engine, self.pipeline, self.server, self.url = engine, pipeline, server, url
        self.client = httpx.Client(base_url=url, timeout=PATIENCE_S)

    def generate(self, prompt: str = "a red cube", **fields: Any) -> httpx.Response:
        return self.client.post("/generate/", data={"prompt": prompt, **fields})


def settings(**changes: Any) -> Any:
    values = {"profile": "tiny", "profile_reason": "a test", "device": "cpu", "max_queue": 3, "log_file": Path("x")}
    values["allowed_hosts"] = ("gpu.example", "10.0.0.5")
    values |= {"memory_class": "24gb", "memory_reason": "a test", "validation_threshold": 0.6}
    values |= {"config": Path("text.yaml"), "options": SimpleNamespace(generator="dreamgaussian")}
    values |= {"image_config": Path("image.yaml"), "image_options": SimpleNamespace(generator="lgm")}
    values["models"] = SimpleNamespace(score_parts=("iqa", "alignment", "ssim"))
    values |= {"gallery": Path("/nonexistent/gallery"), "miner_url": "http://127.0.0.1:9"}
    values["missing"] = {"lpips": "alexnet is not on this machine"}
    return SimpleNamespace(**{**values, **changes})


@contextlib.contextmanager
def serving(
    load: Callable[[StandInPipeline, Callable[[str], None]], Any] | None = None,
    max_queue: int = 3,
    max_batch: int = 1,
    its_settings: Any = None,
) -> Iterator[Service]:
    """A service on a free port. ``load`` replaces the loading of the models."""
    pipeline = StandInPipeline()
    engine = Engine(
        (lambda progress: load(pipeline, progress)) if load else (lambda progress: pipeline), max_queue, max_batch
    )
    with serving_engine(engine, max_queue, its_settings) as (url, server):
        service = Service(engine, pipeline, server, url)
        try:
            if load is None:
                wait_until(lambda: engine.status == "ready")
            yield service
        finally:
            pipeline.go.set()
            service.client.close()


@contextlib.contextmanager
def serving_engine(
    engine: Engine | Fleet, max_queue: int, its_settings: Any = None
) -> Iterator[tuple[str, uvicorn.Server]]:
    """The URL of a service around ``engine``, and its server."""
    app = create_app(engine, its_settings or settings(max_queue=max_queue))
    listener = listen("127.0.0.1", 0)
    server = Server(app, grace_s=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        listener.close()


def wait_until(condition: Callable[[], Any], patience: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.005)


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """The thread that makes the call, and a list that gets its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    return thread, results


def request_of(prompt: str, seed: int = 1, background: bool = False) -> Request:
    return Request(prompt=prompt, seed=seed, threshold=0.6, background=background)


def ask(service: Service, prompt: str, priority: str) -> tuple[threading.Thread, list[Any]]:
    """A request in a thread: as ``in_thread``."""
    form, headers = {"prompt": prompt}, {"X-Priority": priority}
    return in_thread(lambda: httpx.post(service.url + "/generate/", data=form, headers=headers, timeout=PATIENCE_S))


def hold(service: Service, priority: str = "interactive") -> tuple[threading.Thread, list[Any]]:
    """Occupy the engine until ``service.pipeline.go`` is set."""
    held = ask(service, "hold", priority)
    wait_until(lambda: service.engine.active)
    return held
