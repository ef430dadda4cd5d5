"""What the pipeline is asked for and what comes back: plain values that go from process to process. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from generation.splats.gaussians import Gaussians


@dataclass(frozen=True)
class Request:
    """What to make: a text or an image prompt, exactly one of them."""

    prompt: str | None
    image: Image.Image | None  # where it is transparent its sender cut it out: it is not matted then
    seed: int
    threshold: float  # lowest score worth submitting, 0..1
    deadline: float | None = None  # on time.monotonic(); later, the request fails with TimeoutError
    target: Image.Image | None = None  # of an image prompt: the picture as a validator opens it, RGB


@dataclass(frozen=True)
class GateResult:
    """One hard rule: what was measured, and the limit it is held against."""

    passed: bool
    value: float
    limit: float
    reason: str = ""  # when not passed: name, figure and limit in words


@dataclass
class Report:
    """How a request went."""

    seed: int
    score: float | None = None  # None: not measured (rejected before the scoring)
    gates: dict[str, GateResult] = field(default_factory=dict)
    num_gaussians: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # per stage
    rejected: str | None = None  # the reason, when it was
    text_cut: dict[str, tuple[int, int]] = field(default_factory=dict)  # model -> tokens it reads, of how many
    device: str = ""  # that it ran on: the engine says

    @property
    def total_seconds(self) -> float:
        """What all stages took; what it waited is not in it."""
        return sum(self.seconds.values())


@dataclass
class Asset:
    """A finished request. ``ply`` is empty when it was rejected; ``gaussians`` stay for a video."""

    ply: bytes
    report: Report
    gaussians: Gaussians | None = None


@dataclass(frozen=True)
class Scores:
    """The answer of the validators' scoring service.

    ``score`` is the alignment score, or 0 where a validator's is: a gate not passed, an alignment under 0.3. The public
    validators weigh in a learned image quality (``iqa``) and LPIPS; both need weights that are not here, so they are
    None: not measured. ``ssim`` is measured, between neighbouring views, and None when a gate was not passed.
    """

    score: float
    alignment_score: float
    iqa: float | None
    ssim: float | None
    lpips: float | None
    gates: dict[str, GateResult] = field(default_factory=dict)


class Cancelled(Exception):
    """The caller gave the request up."""
