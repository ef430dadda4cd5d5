"""From a prompt to a checked splat: the four stages in order, for many requests at once. No HTTP, no threads."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from torch import Tensor
from torch.profiler import record_function

from generation.pipeline.batch_limit import BatchLimit, in_batches, is_out_of_memory, release_cache
from generation.pipeline.job import Job, Progress
from generation.schema.options import DreamGaussianOptions
from generation.schema.results import Asset, Cancelled, GateResult, Report, Request, Scores
from generation.schema.score import in_words
from generation.settings import Settings
from generation.splats import ply
from generation.splats.rasterize import warm_up
from generation.stages.background import BackgroundRemover, NothingInImage, recentre
from generation.stages.self_check import Check, SelfCheck, fit_to_frame, grid_preview, preview, to_tensor
from generation.stages.text_to_image import TextToImage
from generation.weights import local_folder, lookup
from generation.weights.strict import naming

__all__ = ["Asset", "Cancelled", "GateResult", "Job", "Pipeline", "Progress", "Report", "Request", "Scores"]

log = logging.getLogger("generation.pipeline")

T = TypeVar("T")


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
        max_batch: int,
    ) -> None:
        #: how many requests may run together: fewer for a while when the GPU's memory was full
        self.limit = BatchLimit(max_batch)
        # A picture needs more memory in one stage than in another, and scenes are what fills it.
        self._stage_limits = {stage: BatchLimit(max_batch) for stage in ("text_to_image", "background", "self_check")}
        self._text_to_image = text_to_image
        self._background = background
        self._dreamgaussian = dreamgaussian
        self._self_check = self_check
        self._options = options
        self._device = device
        #: name, revision, licence, precision, device of each, and whether the revision is a commit: for /health
        self.models = models

    @classmethod
    def load(
        cls, settings: Settings, progress: Callable[[str], None] = lambda text: None, warm: bool = True
    ) -> Pipeline:
        """Load every model of ``settings.models`` onto ``settings.device``; ``progress`` is told each step in words.

        ``warm`` it up, too. Raises WeightsError when a checkpoint is missing or can not be used. Downloads nothing.
        """
        from generation.generators.dreamgaussian import DreamGaussian, MVDream, Zero123

        _quiet_libraries()
        models, device = settings.models, settings.device
        choices = {**models.needed(settings.options), **models.optional}
        entries = {stage: lookup(choice) for stage, choice in choices.items()}
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
        with loading("clip"):
            for stage in models.optional:
                progress(f"loading {entries[stage].name} for {stage} onto {device}")
            self_check = SelfCheck.load(folders, entries, models, device)
        about = [
            {
                "stage": stage,
                "name": entry.name,
                "revision": entry.revision,
                "pinned": entry.pinned,
                "licence": entry.licence,
                "precision": choices[stage].precision,
                "device": device,
            }
            for stage, entry in entries.items()
        ]
        progress("compiling the rasteriser, or loading it from its cache")
        warm_up(device)
        dreamgaussian = DreamGaussian(guidance, settings.options, device, background.remove, image_guidance)
        pipeline = cls(
            text_to_image, background, dreamgaussian, self_check, settings.options, device, about, models.max_batch
        )
        if warm:
            pipeline.warm_up(progress)
        return pipeline

    def warm_up(self, progress: Callable[[str], None] = lambda text: None) -> None:
        """On a GPU, compile what is compiled and make a first splat, so that no later one pays for what comes first.

        Raises what that fails with.
        """
        if not self._device.startswith("cuda"):
            return
        torch.backends.cudnn.benchmark = True  # shapes are few: the fastest algorithm for each is looked for
        self._dreamgaussian.warm_up(self.limit.most, progress)
        progress("compiling text to image, or loading it from its cache")
        self._text_to_image.warm_up(self.limit.most)
        progress("looking for the fastest kernels of background removal and self-check")
        self._warm_up_batches()
        progress("making a first splat, to warm up")
        requests = [Request(prompt="a red cube", seed=0, threshold=0.0)]
        if self._options.init == "views":  # where a picture is encoded, and views are drawn around it
            disc = Image.new("RGB", (256, 256), "white")
            ImageDraw.Draw(disc).ellipse((64, 64, 192, 192), "red")
            requests.append(Request(image=disc, seed=0, threshold=0.0))
        for request in requests:
            (outcome,) = self.generate([request])
            if isinstance(outcome, Exception):
                raise outcome

    def _warm_up_batches(self) -> None:
        """Each number of pictures and texts that may come at once: algorithms are chosen for one size of a batch."""
        for stage, work in (("background", self._background.warm_up), ("self_check", self._self_check.warm_up)):

            def each(batch: list[int], work: Callable[[int], None] = work) -> list[int]:
                work(len(batch))
                return batch

            for count in range(self.limit.most, 0, -1):
                in_batches(self._stage_limits[stage], list(range(count)), each)
        for count in range(1, self.limit.most + 1):
            texts = [f"{number} of {count}" for number in range(count)]
            self._dreamgaussian.read(texts)
            self._self_check.read(texts)

    def begin(
        self,
        request: Request,
        progress: Progress = lambda stage, fraction: None,
        cancelled: Callable[[], bool] = lambda: False,
        paused: Callable[[], bool] = lambda: False,
    ) -> Job:
        """The request as a job for ``tick``. Every random number comes from generators seeded with its seed."""
        return Job(request, progress, cancelled, Report(request.seed), paused)

    def tick(self, jobs: list[Job]) -> None:
        """Bring each job closer to its outcome: to a scene at first, then by one iteration, at last through the check.

        All scenes share the iteration's one step. Jobs may join and leave between ticks; a job's failure is its own,
        and its outcome does not depend on the others. Those that are paused meanwhile are left alone, from the next
        stage on: they go on in a later tick, where they are.
        """
        paused = [job for job in jobs if job.paused()]
        running = [job for job in jobs if job not in paused and not job.waits]
        for job in jobs:
            if job in paused:
                job.rest()
            elif job.waits:
                job.wanted("queued")
            else:
                job.resume()
        for stages in (self._to_scenes, self._through_scenes, self._to_results):
            stages([job for job in running if not job.paused()])
        self._put_back(running, paused)
        self._count_good(running)

    def _to_scenes(self, running: list[Job]) -> None:
        fresh = [job for job in running if job.scene is None]
        self._note_cuts(fresh)
        for job, image in self._run("text_to_image", [job for job in fresh if job.image is None], self._draw):
            job.image = image
        if any(job.paused() for job in fresh):
            return
        # Where the CPU would only wait, while the GPU draws and while it works on the first iteration, it does what it
        # can for later: texts are read, and scenes begun as far as they do not depend on the picture.
        self._read(self._dreamgaussian.read, fresh)
        self._sketch(fresh)
        for job, cutout in self._run("background", [job for job in fresh if job.cutout is None], self._cut_out):
            if isinstance(cutout, Tensor):
                job.cutout = cutout
            else:
                job.reject(str(cutout))
        for job in fresh:
            if not job.paused():
                self._begin_scenes([job])

    def _through_scenes(self, running: list[Job]) -> None:
        self._step([job for job in running if job.outcome is None and job.scene is not None])
        begun = [job for job in running if job.scene is not None and job.scene.iteration == 1]
        self._read(self._self_check.read, begun)

    def _to_results(self, running: list[Job]) -> None:
        finished = [job for job in running if job.gaussians is not None]
        for job, check in self._run("self_check", finished, self._judge):
            self._deliver(job, check)

    def _count_good(self, running: list[Job]) -> None:
        """Requests that came to a result, for the limits of all stages that they went through."""
        for job in running:
            for stage in job.report.seconds if isinstance(job.outcome, Asset) else ():
                self._stage_limits.get(stage, self.limit).went_well()

    def _put_back(self, running: list[Job], paused: list[Job]) -> None:
        """Let those for which memory was full beside others try once more when the others are done.

        Not behind those that are paused for them: these give up their scenes, and begin them again.
        """
        full = [job for job in running if isinstance(job.outcome, Exception) and is_out_of_memory(job.outcome)]
        going_on = [job for job in running if job.outcome is None]
        for job in full:
            if job.put_back or (len(running) == 1 and not paused):
                continue
            for other in paused:
                other.scene, other.gaussians = None, None
            if paused:
                release_cache()
            job.outcome, job.scene, job.gaussians = None, None, None
            job.put_back, job.behind = True, list(going_on)
            going_on.append(job)  # of several, one after the other
            if len(running) > 1:
                self.limit.out_of_memory(len(running))

    def _run(self, stage: str, jobs: list[Job], work: Callable[[list[Job]], Sequence[T]]) -> list[tuple[Job, T]]:
        """The stage's result for each job that it could be done for; timed. The others have their outcome.

        They go through it together, as many as fit into memory. When that fails, whose fault it was is unknown, so each
        does it by itself.
        """
        jobs = [job for job in jobs if job.wanted(stage)]
        started = time.perf_counter()
        done: list[tuple[Job, T]] = []
        try:
            with record_function(stage):  # its name in a trace
                done = list(zip(jobs, in_batches(self._stage_limits.get(stage, self.limit), jobs, work), strict=True))
        except Exception as error:
            alone = jobs if len(jobs) > 1 else []
            if not alone and jobs:
                jobs[0].outcome = error
        else:
            alone = []
        for job in alone:
            try:
                done += zip([job], work([job]), strict=True)
            except Exception as error:
                job.outcome = error
        for job in jobs:
            if isinstance(job.outcome, Exception) and is_out_of_memory(job.outcome):
                release_cache()
            job.report.seconds[stage] = time.perf_counter() - started
        return done

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

    def validate(
        self, ply_data: bytes, prompt: str | Image.Image, single: bool = False, grid: bool = False, above: float = 0.6
    ) -> Scores:
        """Score a splat as the validators' service does; previews are for scores over ``above``.

        Raises ValueError when the PLY can not be read.
        """
        check = self._self_check.check(ply.read(ply_data).to(self._device), prompt)
        score, views = check.score or 0.0, check.views
        return Scores(
            score=score,
            iqa=check.parts["iqa"],
            alignment_score=check.parts["alignment"] or 0.0,
            ssim=check.parts["ssim"] or 0.0,
            lpips=check.parts["lpips"],
            preview=preview(views) if single and views is not None and score > above else None,
            grid_preview=grid_preview(views) if grid and views is not None and score > above else None,
            gates=check.gates,
        )

    def _draw(self, jobs: list[Job]) -> list[Tensor]:
        """The reference images (3, H, W) in 0..1: drawn for the prompts, or those that were sent."""
        requests = [job.request for job in jobs]
        ask = self._options.text_to_image_prompt
        written = [(ask(r.prompt), r.seed) for r in requests if r.prompt is not None]
        drawn = iter(self._text_to_image.generate([w[0] for w in written], [w[1] for w in written]) if written else [])
        images = []
        for request in requests:
            if request.image is not None:
                images.append(to_tensor(request.image.convert("RGB")).to(self._device))
            else:
                images.append(next(drawn))
        return images

    def _cut_out(self, jobs: list[Job]) -> list[Tensor | NothingInImage]:
        """The cut-outs (4, ref_size, ref_size) in 0..1 of images, those of one size together.

        The alpha of a picture that was sent with one is its mask, as in DreamGaussian.
        """
        alphas: dict[Job, Tensor] = {}
        for job in jobs:
            if (mask := _mask(job.request.image)) is not None:
                alphas[job] = mask.to(self._device)
        given, matted = set(alphas), [job for job in jobs if job not in alphas]
        for shape in {job.image.shape for job in matted if job.image is not None}:
            same = [(job, job.image) for job in matted if job.image is not None and job.image.shape == shape]
            removed = self._background.remove(torch.stack([image for _, image in same]))
            alphas |= dict(zip([job for job, _ in same], removed, strict=True))
        cutouts: list[Tensor | NothingInImage] = []
        for job in jobs:
            assert job.image is not None
            try:
                cutouts.append(recentre(job.image, alphas[job], self._options.ref_size, given=job in given))
            except NothingInImage as nothing:
                cutouts.append(nothing)
        return cutouts

    def _read(self, read: Callable[[Sequence[str]], None], jobs: list[Job]) -> None:
        """Encode the prompts of jobs before they are needed: together, in the time of one."""
        prompts = [job.request.prompt for job in jobs if job.outcome is None]
        if texts := [prompt for prompt in prompts if prompt]:
            with suppress(Exception):  # whose fault it was is unknown: each reads its own when it is needed
                read(texts)

    def _note_cuts(self, jobs: list[Job]) -> None:
        """Tell which models will read only the beginning of a prompt."""
        for job in jobs:
            if (prompt := job.request.prompt) is None or job.report.text_cut:
                continue
            with suppress(Exception):  # what can not be read fails in its stage, and is told then
                drawn = self._text_to_image.cut(self._options.text_to_image_prompt(prompt))
                job.report.text_cut = drawn | self._dreamgaussian.cut(prompt) | self._self_check.cut(prompt)
            if job.report.text_cut:
                tokens = ", ".join(f"{name} {read} of {count}" for name, (read, count) in job.report.text_cut.items())
                log.warning("The prompt is cut (seed %d), tokens read: %s", job.request.seed, tokens)

    def _sketch(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.outcome is None and job.sketch is None:
                with suppress(Exception):  # it fails again when the scene starts, and is told then
                    job.sketch = self._dreamgaussian.sketch(_words(job), job.request.seed)

    def _begin_scenes(self, jobs: list[Job]) -> None:
        def begin(batch: list[Job]) -> list[Any]:
            scenes = []
            for job in batch:
                sketch, job.sketch = job.sketch, None  # it can be used once
                scenes.append(self._dreamgaussian.start(job.cutout, _words(job), job.request.seed, sketch))
            return scenes

        for job in jobs:
            job.scene_began = time.perf_counter()
            for _, scene in self._run("dreamgaussian", [job], begin):
                job.scene = scene

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
        room = self.limit.now
        groups = [together[start : start + room] for start in range(0, len(together), room)]
        groups += [[job] for job in unfinished if job.alone]
        for group in groups:
            if not self._step_group(group):
                release_cache()  # here the exception is gone, and with it what its frames held
                self._begin_scenes(group)
        for job in jobs:
            job.report.seconds["dreamgaussian"] = time.perf_counter() - job.scene_began

    def _step_group(self, group: list[Job]) -> bool:
        """One iteration of these scenes. False when it failed for several, so that they must begin again.

        The step may be half done then. When memory was full, fewer are stepped together from now on; for any other
        reason whose fault it was is unknown, and each goes on by itself.
        """
        try:
            self._dreamgaussian.step([job.scene for job in group])
            return True
        except Exception as error:
            if len(group) == 1:
                group[0].outcome = error
                return True
            if is_out_of_memory(error):
                self.limit.out_of_memory(len(group))
            else:
                for job in group:
                    job.alone = True
            return False

    def _judge(self, jobs: list[Job]) -> list[Check]:
        splats = []
        for job in jobs:
            request = job.request
            picture = request.image if request.target is None else request.target
            prompt = request.prompt if picture is None else picture
            assert job.gaussians is not None
            assert prompt is not None
            splats.append((job.gaussians, prompt))
        return self._self_check.check_all(splats, fit=True)

    def _deliver(self, job: Job, check: Check) -> None:
        request, report, gaussians = job.request, job.report, job.gaussians
        assert gaussians is not None
        report.num_gaussians = len(gaussians)
        report.gates = check.gates
        if check.score is None:
            job.reject(check.failed_gate or "not scored")
            return
        report.score, report.parts = min(1.0, check.score), check.parts  # limited as a validator's feedback is
        job.gaussians = fit_to_frame(gaussians)
        if report.score < request.threshold:
            shown = math.floor(report.score * 100) / 100  # never rounded up to the threshold
            job.reject(f"score {in_words(shown, check.parts)} is under the threshold {request.threshold:.2f}")
            return
        job.outcome = Asset(ply.write(job.gaussians), report, job.gaussians)


def _mask(image: Image.Image | None) -> Tensor | None:
    """The alpha (1, H, W) in 0..1 of a picture in which anything is transparent."""
    if image is None or not image.has_transparency_data:
        return None
    alpha = np.array(image.convert("RGBA").getchannel("A"))
    return torch.from_numpy(alpha)[None].float() / 255 if alpha.min() < 255 else None


def _words(job: Job) -> str:
    """An image prompt has none: the reference view leads it, with Zero123 where the config has it."""
    return job.request.prompt or ""


def _quiet_libraries() -> None:
    """No progress bars in the log, nor warnings that quote prompts."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
