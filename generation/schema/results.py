"""Requests and results: plain values that are passed between processes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from generation.splats.gaussians import Gaussians


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, from intake to the result. Raises ValueError unless it has exactly one of prompt and image."""

    prompt: str | None = None
    image: Image.Image | None = None  # if transparent, it is a cut-out already and is not matted
    target: Image.Image | None = None  # of an image prompt: the picture as a validator opens it, RGB
    seed: int  # 0..2**32 - 1; all random numbers come from it
    threshold: float  # lowest score worth submitting, 0..1
    candidates: int = 1  # number of splats to make with other seeds; the best is the result
    budget_seconds: float | None = None  # after which the best candidate so far is the result
    # A person watches it: previews are reported, and a rejected splat is delivered all the same.
    watched: bool = False
    background: bool = False  # paused while there are interactive requests, and without a deadline
    deadline: float | None = None  # on time.monotonic(), set by the engine; later, it fails with TimeoutError

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.image is None):
            given = "neither" if self.prompt is None else "both"
            raise ValueError(f"a request is made of exactly one of prompt and image, not of {given}")


@dataclass(frozen=True)
class GateResult:
    """The result of one hard rule: the measured value and its limit."""

    passed: bool
    value: float
    limit: float
    reason: str = ""  # when not passed: name, figure and limit in words


@dataclass
class Report:
    """The report of a request, beside its PLY."""

    seed: int
    score: float | None = None  # the validators' final score, 0..1. None: not measured (rejected before the scoring)
    # its parts: alignment, iqa, ssim, lpips; None for a part without weights
    parts: dict[str, float | None] = field(default_factory=dict)
    gates: dict[str, GateResult] = field(default_factory=dict)
    num_gaussians: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # per stage
    rejected: str | None = None  # the reason, if it was rejected
    hopeless: bool = False  # rejected for a reason that does not depend on the seed
    text_cut: dict[str, tuple[int, int]] = field(default_factory=dict)  # model -> (tokens read, tokens in all)
    device: str = ""  # where it ran; set by the engine
    # of several candidates: (seed, score) of each that was finished, the request's own seed first
    candidates: list[tuple[int, float | None]] = field(default_factory=list)

    @property
    def total_seconds(self) -> float:
        """The time of all stages, without waiting."""
        return sum(self.seconds.values())


@dataclass
class Asset:
    """A finished request. ``ply`` is empty when it was rejected, unless it is watched.

    ``gaussians`` are there for scripts that study rejections, too. They do not leave the engine's process.
    """

    ply: bytes
    report: Report
    gaussians: Gaussians | None = None


@dataclass(frozen=True)
class Scores:
    """The answer of the validators' scoring service.

    If a gate fails, all scores are 0. A part without weights is None. Previews are PNG files: the view that validators
    show, and the four that duels are judged on.
    """

    score: float
    iqa: float | None
    alignment_score: float
    ssim: float
    lpips: float | None
    preview: bytes | None = None
    grid_preview: bytes | None = None
    gates: dict[str, GateResult] = field(default_factory=dict)


class Cancelled(Exception):
    """The caller cancelled the request."""
