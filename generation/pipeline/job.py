"""A request on its way through the pipeline."""

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

#: stage, and the share of it that is done; where the request asks for previews, a WEBP as well
Progress = Callable[..., None]


@dataclass(eq=False)
class Job:
    """A request on its way. It has an ``outcome`` when it is there."""

    request: Request
    progress: Progress
    cancelled: Callable[[], bool]
    report: Report
    #: Whether something goes before it: then it is left alone between two stages or ticks, and keeps what it has.
    paused: Callable[[], bool] = lambda: False
    paused_at: float | None = None  # on time.perf_counter(), while it is
    image: Tensor | None = None  # (3, H, W) in 0..1
    cutout: Tensor | None = None  # (4, S, S) in 0..1, in its generator's frame
    prefetched: Any = None  # by its generator, until the work begins
    work: Work | None = None
    work_began: float = 0.0  # on time.perf_counter()
    ticks: int = 0  # of its work
    shown: int = -1  # the latest preview of its work
    isolated: bool = False  # a tick together with others failed: whose fault it was is unknown
    gaussians: Gaussians | None = None
    waits_for: list[Job] = field(default_factory=list)  # memory was full beside these: it waits until they are done
    retried: bool = False  # it has had that chance
    outcome: Asset | Exception | None = None

    def advance(self, stage: str, fraction: float) -> None:
        """Tell how far it is. Raises Cancelled or TimeoutError when it is not wanted any more."""
        if self.cancelled():
            raise Cancelled("the request was cancelled")
        if self.request.deadline is not None and time.monotonic() > self.request.deadline:
            raise TimeoutError(f"the deadline passed in stage {stage}")
        self.progress(stage, fraction)

    def preview(self, stage: str, fraction: float, make: Callable[[], bytes]) -> None:
        """Tell what it looks like, where that is asked for. A picture that can not be made is left out."""
        if self.request.watched and self.outcome is None:
            with suppress(Exception):
                self.progress(stage, fraction, make())

    @property
    def is_waiting(self) -> bool:
        # Those that are done are let go, or their works would stay in memory that this one needs.
        self.waits_for = [other for other in self.waits_for if other.outcome is None]
        return bool(self.waits_for)

    def pause(self) -> None:
        """It is paused: neither that nor what it takes is in the times of its report."""
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
        """It begins again later, with nothing of it in memory until then."""
        self.work, self.gaussians = None, None

    def reject(self, reason: str) -> None:
        self.report.rejected = reason
        self.outcome = Asset(b"", self.report, self.gaussians)

    def is_wanted(self, stage: str) -> bool:
        """Whether there is a stage to do for it; without, it has its outcome."""
        if self.outcome is not None:
            return False
        try:
            self.advance(stage, 0.0)
        except Exception as error:
            self.outcome = error
        return self.outcome is None
