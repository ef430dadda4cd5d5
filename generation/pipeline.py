"""From a prompt to a checked splat: the four stages in order, for a batch of requests. No HTTP, no threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor

from generation.background import BackgroundRemover, NothingInImage, recentre
from generation.self_check import MIN_ALIGNMENT, GateResult, SelfCheck, fit_to_frame, neighbour_ssim, to_tensor
from generation.settings import DreamGaussianOptions, Settings
from generation.splats import ply
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import warm_up
from generation.text_to_image import TextToImage
from generation.weights import local_folder, lookup
from generation.weights.strict import naming

__all__ = ["Asset", "Cancelled", "GateResult", "Pipeline", "Report", "Request", "Scores"]

#: index of the request in the batch, stage, share of that stage that is done
Progress = Callable[[int, str, float], None]


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


@dataclass
class _Job:
    """A request on its way."""

    index: int
    request: Request
    report: Report
    progress: Progress
    cancelled: Callable[[int], bool]
    image: Tensor | None = None  # (3, H, W) in 0..1
    cutout: Tensor | None = None  # (4, ref_size, ref_size) in 0..1
    gaussians: Gaussians | None = None
    outcome: Asset | Exception | None = None

    def advance(self, stage: str, fraction: float) -> None:
        """Tell how far it is. Raises Cancelled or TimeoutError when it is not wanted any more."""
        if self.cancelled(self.index):
            raise Cancelled("the request was cancelled")
        if self.request.deadline is not None and time.monotonic() > self.request.deadline:
            raise TimeoutError(f"the deadline passed in stage {stage}")
        self.progress(self.index, stage, fraction)

    def reject(self, reason: str) -> None:
        self.report.rejected = reason
        self.outcome = Asset(b"", self.report, self.gaussians)

    def run(self, stage: str, work: Callable[[_Job], None]) -> None:
        """Do a stage's work, timed; a failure ends this request alone. Nothing is done once there is an outcome."""
        if self.outcome is not None:
            return
        started = time.perf_counter()
        try:
            self.advance(stage, 0.0)
            work(self)
        except Exception as error:
            self.outcome = error
        finally:
            self.report.seconds[stage] = time.perf_counter() - started


class Pipeline:
    """All models of a profile, loaded, and the way through them."""

    def __init__(
        self,
        text_to_image: TextToImage,
        background: BackgroundRemover,
        dreamgaussian: Any,
        self_check: SelfCheck,
        options: DreamGaussianOptions,
        device: str,
        models: list[dict[str, Any]],
    ) -> None:
        self._text_to_image = text_to_image
        self._background = background
        self._dreamgaussian = dreamgaussian
        self._self_check = self_check
        self._options = options
        self._device = device
        #: name, revision, licence, device of each, and whether the revision is a commit: for /health
        self.models = models

    @classmethod
    def load(cls, settings: Settings, progress: Callable[[str], None] = lambda text: None) -> Pipeline:
        """Load every model of ``settings.models`` onto ``settings.device``; ``progress`` is told each step in words.

        Raises WeightsError when a checkpoint is missing or can not be used. Downloads nothing.
        """
        from generation.dreamgaussian import DreamGaussian, MVDream, Zero123

        _quiet_libraries()
        models, device = settings.models, settings.device
        entries = {stage: lookup(choice) for stage, choice in models.needed(settings.options).items()}
        folders = {stage: local_folder(entry) for stage, entry in entries.items()}

        @contextmanager
        def loading(stage: str) -> Iterator[Path]:
            progress(f"loading {entries[stage].name} for {stage} onto {device}")
            with naming(entries[stage]):
                yield folders[stage]

        with loading("text_to_image") as folder:
            text_to_image = TextToImage.load(folder, models.text_to_image, device)
        with loading("background") as folder:
            background = BackgroundRemover.load(folder, models.background, device)
        guidance = image_guidance = None
        if "mvdream" in entries:
            with loading("mvdream") as folder:
                dtype, front = getattr(torch, models.mvdream.dtype), entries["mvdream"].front_azimuth
                guidance = MVDream.load(folder, device, dtype, front)
        for stage, choice in (("zero123", models.zero123), ("stable_zero123", models.stable_zero123)):
            if stage in entries and choice is not None:
                with loading(stage) as folder:
                    stable = stage == "stable_zero123"
                    image_guidance = Zero123.load(folder, device, getattr(torch, choice.dtype), stable)
        with loading("clip") as folder:
            self_check = SelfCheck.load(folder, models.clip, entries["clip"].clip, device)
        about = [
            {
                "stage": stage,
                "name": entry.name,
                "revision": entry.revision,
                "pinned": entry.pinned,
                "licence": entry.licence,
                "device": device,
            }
            for stage, entry in entries.items()
        ]
        if device == "cpu":
            progress("compiling the rasteriser, or loading it from its cache")
            warm_up()
        dreamgaussian = DreamGaussian(guidance, settings.options, device, background.remove, image_guidance)
        return cls(text_to_image, background, dreamgaussian, self_check, settings.options, device, about)

    def generate(
        self,
        requests: list[Request],
        progress: Progress = lambda index, stage, fraction: None,
        cancelled: Callable[[int], bool] = lambda index: False,
    ) -> list[Asset | Exception]:
        """One outcome for each request, in order: an asset (which may be a rejection), or what went wrong with it.

        A request's failure is its own. Every random number comes from generators seeded with the request's seed.
        """
        jobs = [
            _Job(index, request, Report(request.seed), progress, cancelled) for index, request in enumerate(requests)
        ]
        for job in jobs:
            job.run("text_to_image", self._draw)
            job.run("background", self._cut_out)
        self._optimise([job for job in jobs if job.outcome is None])
        for job in jobs:
            job.run("self_check", self._judge)
        return [_finished(job) for job in jobs]

    def validate(self, ply_data: bytes, prompt: str | Image.Image) -> Scores:
        """Score a splat as the validators' service does. Raises ValueError when the PLY can not be read."""
        check = self._self_check.check(ply.read(ply_data).to(self._device), prompt)
        alignment = check.score or 0.0
        score = alignment if alignment >= MIN_ALIGNMENT else 0.0
        ssim = None if check.views is None else neighbour_ssim(check.views)
        return Scores(score, alignment, iqa=None, ssim=ssim, lpips=None, gates=check.gates)

    def _draw(self, job: _Job) -> None:
        request = job.request
        if request.image is not None:
            job.image = to_tensor(request.image).to(self._device)
        elif request.prompt is not None:
            job.image = self._text_to_image.generate(request.prompt, request.seed)
        else:
            raise ValueError("a request needs a prompt or an image")

    def _cut_out(self, job: _Job) -> None:
        assert job.image is not None
        alpha = self._background.remove(job.image[None])[0]
        try:
            job.cutout = recentre(job.image, alpha, self._options.ref_size)
        except NothingInImage as error:
            job.reject(str(error))

    def _optimise(self, jobs: list[_Job]) -> None:
        """Step the scenes of all jobs together, until each is done."""
        started = time.perf_counter()
        scenes: dict[int, Any] = {}

        def start(job: _Job) -> None:
            # An image prompt has no words: the reference view leads it, with Zero123 where the config has it.
            prompt = job.request.prompt or ""
            scenes[job.index] = self._dreamgaussian.start(job.cutout, prompt, job.request.seed)

        for job in jobs:
            job.run("dreamgaussian", start)
        active = [job for job in jobs if job.index in scenes]
        while active:
            for job in active:
                scene = scenes[job.index]
                try:
                    job.advance("dreamgaussian", scene.iteration / self._options.iters)
                    if scene.done:
                        job.gaussians = scene.gaussians().detach()
                except Exception as error:
                    job.outcome = error
                if job.gaussians is not None or job.outcome is not None:
                    job.report.seconds["dreamgaussian"] = time.perf_counter() - started
            active = [job for job in active if job.gaussians is None and job.outcome is None]
            if not active:
                return
            try:
                self._dreamgaussian.step([scenes[job.index] for job in active])
            except Exception as error:
                if len(active) == 1:
                    active[0].outcome = error
                    active[0].report.seconds["dreamgaussian"] = time.perf_counter() - started
                else:
                    # Whose fault it was is unknown, and the step may be half done: each goes again, alone.
                    for job in active:
                        del scenes[job.index]
                        self._optimise([job])
                return

    def _judge(self, job: _Job) -> None:
        request, report, gaussians = job.request, job.report, job.gaussians
        prompt = request.image if request.image is not None else request.prompt
        assert gaussians is not None and prompt is not None
        report.num_gaussians = len(gaussians)
        check = self._self_check.check(gaussians, prompt)
        report.gates, report.score = check.gates, check.score
        if check.score is None:
            job.reject(check.failed_gate or "not scored")
            return
        job.gaussians = fit_to_frame(gaussians)
        if check.score < request.threshold:
            shown = math.floor(check.score * 100) / 100  # never rounded up to the threshold
            job.reject(f"CLIP score {shown:.2f} is under the threshold {request.threshold:.2f}")
            return
        job.outcome = Asset(ply.write(job.gaussians), report, job.gaussians)


def _quiet_libraries() -> None:
    """No progress bars in the log, nor warnings that quote prompts."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _finished(job: _Job) -> Asset | Exception:
    assert job.outcome is not None
    return job.outcome
