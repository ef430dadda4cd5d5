"""A request in progress in the pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from generation.generators.base import Work
from generation.schema.results import Asset, Cancelled, Report, Request
from generation.splats.gaussians import Gaussians

#: Called with the stage and its progress (0..1), and for a request that asks for previews with a WEBP as well.
Progress = Callable[..., None]


@dataclass(eq=False)
class Job:
    """The state of one request. When it is finished it has an ``outcome``."""

    request: Request
    progress: Progress
    cancelled: Callable[[], bool]
    report: Report
    #: Whether other requests go first. Then it is skipped between two stages or ticks, and keeps its state.
    paused: Callable[[], bool] = lambda: False
    paused_at: float | None = None  # on time.perf_counter(); None while it is not paused
    image: Tensor | None = None  # (3, H, W) in 0..1
    cutout: Tensor | None = None  # (4, S, S) in 0..1, in its generator's frame
    prefetched: Any = None  # from its generator, until the work begins
    work: Work | None = None
    work_began: float = 0.0  # on time.perf_counter()
    ticks: int = 0  # of its work so far
    shown: int = -1  # number of the latest preview
    isolated: bool = False  # a shared tick failed, and the culprit is unknown: from now on it is ticked alone
    gaussians: Gaussians | None = None
    #: It ran out of memory beside these. It is retried when they are done.
    waits_for: list[Job] = field(default_factory=list)
    retried: bool = False  # that retry happens once
    outcome: Asset | Exception | None = None

    def advance(self, stage: str, fraction: float) -> None:
        """Report progress. Raises Cancelled, or TimeoutError when the deadline has passed."""
        if self.cancelled():
            raise Cancelled("the request was cancelled")
        if self.request.deadline is not None and time.monotonic() > self.request.deadline:
            raise TimeoutError(f"the deadline passed in stage {stage}")
        self.progress(stage, fraction)

    def preview(self, stage: str, fraction: float, make: Callable[[], bytes]) -> None:
        """Report a preview, if the request asks for them. If ``make`` fails there is none."""
        if self.request.watched and self.outcome is None:
            with suppress(Exception):
                self.progress(stage, fraction, make())

    @property
    def is_waiting(self) -> bool:
        """Whether jobs that it ran out of memory beside are not finished."""
        # Drops references to finished jobs: their works would hold memory that this one needs.
        self.waits_for = [other for other in self.waits_for if other.outcome is None]
        return bool(self.waits_for)

    def pause(self) -> None:
        """Pause. The time until ``resume`` does not count in the report."""
        if self.paused_at is None:
            self.paused_at = time.perf_counter()
        self.is_wanted("paused")

    def resume(self) -> None:
        if self.paused_at is not None:
            self.work_began += time.perf_counter() - self.paused_at
            self.paused_at = None

    def begin(self, work: Work) -> None:
        self.work, self.ticks = work, 0

    def discard_work(self) -> None:
        """Free the work's memory. It begins again later."""
        self.work, self.gaussians = None, None

    def reject(self, reason: str) -> None:
        """Finish with an empty PLY, for ``reason``."""
        self.report.rejected = reason
        self.outcome = Asset(b"", self.report, self.gaussians)

    def is_wanted(self, stage: str) -> bool:
        """Whether ``stage`` should run for it. False when it has an outcome; cancellation and deadline are one."""
        if self.outcome is not None:
            return False
        try:
            self.advance(stage, 0.0)
        except Exception as error:
            self.outcome = error
        return self.outcome is None
