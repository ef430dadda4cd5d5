"""From a prompt to a checked splat: the four stages in order, for a batch of requests. No HTTP, no threads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from generation.settings import Settings

log = logging.getLogger("generation.pipeline")

#: index of the request in the batch, stage, share of that stage that is done
Progress = Callable[[int, str, float], None]


@dataclass(frozen=True)
class GateResult:
    """One hard rule of the validators: what was measured, and the limit it is held against."""

    passed: bool
    value: float
    limit: float
    reason: str = ""  # when not passed: name, figure and limit in words


@dataclass(frozen=True)
class Request:
    """What to make: a text or an image prompt, exactly one of them."""

    prompt: str | None
    image: Image.Image | None
    seed: int
    threshold: float  # lowest score worth submitting, 0..1
    deadline: float | None = None  # on time.monotonic(); later, the request fails with TimeoutError


@dataclass
class Report:
    """How a request went."""

    seed: int
    score: float | None = None  # None: not measured (rejected before the scoring)
    gates: dict[str, GateResult] = field(default_factory=dict)
    num_gaussians: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # per stage
    rejected: str | None = None  # the reason, when it was


@dataclass
class Asset:
    """A finished request. ``ply`` is empty when the self-check rejected it; ``gaussians`` stay for a video."""

    ply: bytes
    report: Report
    gaussians: Any | None = None  # generation.splats.gaussians.Gaussians


@dataclass(frozen=True)
class Scores:
    """The answer of the validators' scoring service. None: a quality model whose weights are not public."""

    score: float
    alignment_score: float
    iqa: float | None
    ssim: float | None
    lpips: float | None
    gates: dict[str, GateResult] = field(default_factory=dict)


class Cancelled(Exception):
    """The caller gave the request up."""


class Pipeline:
    """All models of a profile, loaded, and the way through them."""

    models: list[dict[str, Any]]  # name, revision, licence, device of each, for /health

    @classmethod
    def load(cls, settings: Settings, progress: Callable[[str], None]) -> Pipeline:
        """Load every model of ``settings.models`` onto ``settings.device``; ``progress`` is told each step in words."""
        raise NotImplementedError

    def generate(
        self, requests: list[Request], progress: Progress, cancelled: Callable[[int], bool]
    ) -> list[Asset | Exception]:
        """One outcome for each request, in order. A request's failure is its own."""
        raise NotImplementedError

    def validate(self, ply: bytes, prompt: str | Image.Image) -> Scores:
        """Score a splat as the validators' service does. Raises ValueError when ``ply`` can not be read."""
        raise NotImplementedError
