"""From a prompt to a checked splat: the four stages in order, for many requests at once. No HTTP, no threads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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

__all__ = ["Asset", "Cancelled", "GateResult", "Job", "Pipeline", "Report", "Request", "Scores"]

#: stage, and the share of it that is done
Progress = Callable[[str, float], None]


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


@dataclass(eq=False)
class Job:
    """A request on its way. It has an ``outcome`` when it is there."""

    request: Request
    progress: Progress
    cancelled: Callable[[], bool]
    report: Report
    image: Tensor | None = None  # (3, H, W) in 0..1
    cutout: Tensor | None = None  # (4, ref_size, ref_size) in 0..1
    scene: Any = None
    scene_began: float = 0.0  # on time.perf_counter()
    alone: bool = False  # a step together with others failed: whose fault it was is unknown
    gaussians: Gaussians | None = None
    outcome: Asset | Exception | None = None

    def advance(self, stage: str, fraction: float) -> None:
        """Tell how far it is. Raises Cancelled or TimeoutError when it is not wanted any more."""
        if self.cancelled():
            raise Cancelled("the request was cancelled")
        if self.request.deadline is not None and time.monotonic() > self.request.deadline:
            raise TimeoutError(f"the deadline passed in stage {stage}")
        self.progress(stage, fraction)

    def reject(self, reason: str) -> None:
        self.report.rejected = reason
        self.outcome = Asset(b"", self.report, self.gaussians)

    def run(self, stage: str, work: Callable[[Job], None]) -> None:
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
        progress("compiling the rasteriser, or loading it from its cache")
        warm_up(device)
        dreamgaussian = DreamGaussian(guidance, settings.options, device, background.remove, image_guidance)
        return cls(text_to_image, background, dreamgaussian, self_check, settings.options, device, about)

    def begin(
        self,
        request: Request,
        progress: Progress = lambda stage, fraction: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Job:
        """The request as a job for ``tick``. Every random number comes from generators seeded with its seed."""
        return Job(request, progress, cancelled, Report(request.seed))

    def tick(self, jobs: list[Job]) -> None:
        """Bring each job closer to its outcome: to a scene at first, then by one iteration, at last through the check.

        All scenes share the iteration's one step. Jobs may join and leave between ticks; a job's failure is its own,
        and its outcome does not depend on the others.
        """
        for job in jobs:
            if job.scene is None:
                job.run("text_to_image", self._draw)
                job.run("background", self._cut_out)
                job.run("dreamgaussian", self._begin_scene)
        self._step([job for job in jobs if job.outcome is None])
        for job in jobs:
            if job.gaussians is not None:
                job.run("self_check", self._judge)

    def generate(
        self,
        requests: list[Request],
        progress: Callable[[int, str, float], None] = lambda index, stage, fraction: None,
        cancelled: Callable[[int], bool] = lambda index: False,
    ) -> list[Asset | Exception]:
        """One outcome for each request, in order: an asset (which may be a rejection), or what went wrong with it.

        ``progress`` and ``cancelled`` get the request's index first.
        """
        jobs = [
            self.begin(request, partial(progress, index), partial(cancelled, index))
            for index, request in enumerate(requests)
        ]
        while unfinished := [job for job in jobs if job.outcome is None]:
            self.tick(unfinished)
        return [job.outcome for job in jobs if job.outcome is not None]

    def validate(self, ply_data: bytes, prompt: str | Image.Image) -> Scores:
        """Score a splat as the validators' service does. Raises ValueError when the PLY can not be read."""
        check = self._self_check.check(ply.read(ply_data).to(self._device), prompt)
        alignment = check.score or 0.0
        score = alignment if alignment >= MIN_ALIGNMENT else 0.0
        ssim = None if check.views is None else neighbour_ssim(check.views)
        return Scores(score, alignment, iqa=None, ssim=ssim, lpips=None, gates=check.gates)

    def _draw(self, job: Job) -> None:
        request = job.request
        if request.image is not None:
            job.image = to_tensor(request.image).to(self._device)
        elif request.prompt is not None:
            job.image = self._text_to_image.generate(request.prompt, request.seed)
        else:
            raise ValueError("a request needs a prompt or an image")

    def _cut_out(self, job: Job) -> None:
        assert job.image is not None
        alpha = self._background.remove(job.image[None])[0]
        try:
            job.cutout = recentre(job.image, alpha, self._options.ref_size)
        except NothingInImage as error:
            job.reject(str(error))

    def _begin_scene(self, job: Job) -> None:
        job.scene_began = time.perf_counter()
        # An image prompt has no words: the reference view leads it, with Zero123 where the config has it.
        job.scene = self._dreamgaussian.start(job.cutout, job.request.prompt or "", job.request.seed)

    def _step(self, jobs: list[Job]) -> None:
        """One iteration of every scene that is not done, in one call; Gaussians for those that are."""
        unfinished = []
        for job in jobs:
            try:
                job.advance("dreamgaussian", job.scene.iteration / self._options.iters)
                if job.scene.done:
                    job.gaussians = job.scene.gaussians().detach()
                else:
                    unfinished.append(job)
            except Exception as error:
                job.outcome = error
        together = [job for job in unfinished if not job.alone]
        for group in [together, *([job] for job in unfinished if job.alone)]:
            if not group:
                continue
            try:
                self._dreamgaussian.step([job.scene for job in group])
            except Exception as error:
                if len(group) == 1:
                    group[0].outcome = error
                    continue
                # The step may be half done: each begins again, by itself from now on.
                for job in group:
                    job.alone = True
                    job.run("dreamgaussian", self._begin_scene)
        for job in jobs:
            job.report.seconds["dreamgaussian"] = time.perf_counter() - job.scene_began

    def _judge(self, job: Job) -> None:
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
