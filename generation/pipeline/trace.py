"""``--profile-trace``: a PyTorch profiler trace of the first request, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from generation.pipeline import assemble
from generation.pipeline.job import Job
from generation.settings import Settings

#: Ticks that are traced. The first has all stages before the generator. The following are alike, so only these are
#: traced, and the last one with the self-check: the file stays at about ten megabytes.
FIRST_TICKS = 10

log = logging.getLogger("generation.pipeline.trace")


def load(settings: Settings, progress: Callable[[str], None]) -> Any:
    """The pipeline of these settings. With ``profile_trace`` in them its first request is traced.

    Raises OSError when the trace's folder can not be created, and what ``assemble.load`` raises.
    """
    if settings.profile_trace is None:
        return assemble.load(settings, progress)
    settings.profile_trace.parent.mkdir(parents=True, exist_ok=True)
    return Traced(assemble.load(settings, progress), settings.profile_trace)


class Traced:
    """A pipeline that writes a trace of its first request to ``path``, as gzipped JSON. For one thread."""

    def __init__(self, pipeline: Any, path: Path) -> None:
        self._pipeline, self._path = pipeline, path
        self._first: Job | None = None  # None unless it is being traced
        self._ticks = 0
        self._profile: profile | None = None
        self._collecting = True
        self._activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def tick(self, jobs: list[Job]) -> None:
        if self._ticks == 0:
            self._first = jobs[0]
            self._profile = profile(activities=self._activities, acc_events=True)
            self._profile.start()
        if self._profile is None or self._first is None:
            self._pipeline.tick(jobs)
            return
        work = self._first.work
        wanted = self._ticks < FIRST_TICKS or work is None or work.done
        self._collect(self._profile, wanted and not self._first.paused())
        self._ticks += 1
        over = True  # a tick that raises ends all its requests
        try:
            with record_function(f"tick {self._ticks} of {len(jobs)} requests"):
                self._pipeline.tick(jobs)
            over = self._first.outcome is not None
        finally:
            if over:
                self._write(self._profile)
                self._profile = self._first = None  # the job would hold its work in memory

    def _collect(self, running: profile, collecting: bool) -> None:
        if collecting != self._collecting:
            running.toggle_collection_dynamic(collecting, self._activities)
            self._collecting = collecting

    def _write(self, running: profile) -> None:
        """Write the trace. A failure is logged only: the request goes on."""
        started = time.monotonic()
        part = self._path.with_name(self._path.name + ".part.json.gz")  # PyTorch compresses by the name
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            running.stop()
            running.export_chrome_trace(str(part))
            os.replace(part, self._path)
        except (OSError, RuntimeError) as error:
            log.error("No trace of the first request: %s: %s", self._path, error)
            return
        size, seconds = self._path.stat().st_size / 1e6, time.monotonic() - started
        log.info("Trace of the first request: %s, %.1f MB, written in %.1f s", self._path, size, seconds)
