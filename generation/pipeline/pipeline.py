"""From a prompt to a checked splat: draw, cut out, generate, check, for many requests at once. No HTTP, no threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import record_function

from generation.generators.base import Generator, NoSplat, Subject, Visible, Work
from generation.pipeline import preview
from generation.pipeline.batch_limit import BatchLimit, in_batches, is_out_of_memory, release_cache
from generation.pipeline.delivery import deliver
from generation.pipeline.job import Job, Progress
from generation.schema.results import Asset, Cancelled, GateResult, Report, Request, Scores
from generation.splats import ply
from generation.stages.background import BackgroundRemover, NothingInImage, recentre
from generation.stages.self_check import Check, SelfCheck, grid_preview, to_tensor
from generation.stages.self_check import preview as single_preview
from generation.stages.text_to_image import TextToImage

__all__ = ["Asset", "Cancelled", "GateResult", "Job", "Pipeline", "Progress", "Report", "Request", "Scores"]

log = logging.getLogger("generation.pipeline")

T = TypeVar("T")


class Pipeline:
    """The loaded models, and the stages that each request goes through. ``generation.pipeline.assemble`` builds it."""

    def __init__(
        self,
        text_to_image: TextToImage | None,
        background: BackgroundRemover,
        text: Generator,
        image: Generator,
        self_check: SelfCheck,
        device: str,
        models: list[dict[str, Any]],
        max_batch: int,
        take_turns: bool = False,
    ) -> None:
        """``text`` is the generator for texts, ``image`` that for pictures; they may be the same object.

        Without ``text_to_image``, ``text`` must take texts directly. ``image`` must take pictures. With ``take_turns``
        both are offloaded at first, and one at a time is on the device.
        """
        self._set_limits(max_batch)
        self.text_to_image = text_to_image
        self.background = background
        self.text, self.image = text, image
        self._take_turns = take_turns
        self._loaded: Generator | None = None  # the one on the device, if they take turns
        self.self_check = self_check
        self.device = device
        #: for /health: name, revision (and whether it is a commit), licence, precision and device of each model
        self.models = models

    def _set_limits(self, max_batch: int) -> None:
        #: batch limit of the generators' ticks: lowered for a while after an out-of-memory error
        self.limit = BatchLimit(max_batch)
        # The other stages have their own limits, because they need different amounts of memory per picture.
        self.stage_limits = {stage: BatchLimit(max_batch) for stage in ("text_to_image", "background", "self_check")}

    def begin(
        self,
        request: Request,
        progress: Progress = lambda stage, fraction: None,
        cancelled: Callable[[], bool] = lambda: False,
        paused: Callable[[], bool] = lambda: False,
    ) -> Job:
        """A job for ``tick``. All its random generators are seeded with the request's seed."""
        return Job(request, progress, cancelled, Report(request.seed), paused)

    def tick(self, jobs: list[Job]) -> None:
        """Advance each job: prepare its work, or tick the work once; then check the result if the work is done.

        All works of a generator share one tick. Jobs may join and leave between ticks. A job's failure and outcome do
        not depend on other jobs. A job that is paused meanwhile skips the remaining stages, and continues in a later
        tick from where it is.
        """
        paused = [job for job in jobs if job.paused()]
        paused += self._waiting_for_device([job for job in jobs if job not in paused and not job.is_waiting])
        running = [job for job in jobs if job not in paused and not job.is_waiting]
        for job in jobs:
            if job in paused:
                job.pause()
            elif job.is_waiting:
                job.is_wanted("queued")
            else:
                job.resume()
        for stages in (self._prepare_works, self._tick_works, self._check_results):
            stages([job for job in running if not job.paused()])
        self._retry_out_of_memory(running, paused)
        self._count_successes(running)

    def generate(self, requests: list[Request]) -> list[Asset | Exception]:
        """The outcome of each request, in order: an asset, which may be a rejection, or an exception."""
        jobs = [self.begin(request) for request in requests]
        while unfinished := [job for job in jobs if job.outcome is None]:
            self.tick(unfinished)
        return [job.outcome for job in jobs if job.outcome is not None]

    def validate(
        self, ply_data: bytes, prompt: str | Image.Image, single: bool = False, grid: bool = False, above: float = 0.6
    ) -> Scores:
        """Score a splat as the validators' service does. Previews are made for scores above ``above``.

        Raises ValueError when the PLY can not be parsed.
        """
        check = self.self_check.check(ply.read(ply_data).to(self.device), prompt)
        score, views = check.score or 0.0, check.views
        return Scores(
            score=score,
            iqa=check.parts["iqa"],
            alignment_score=check.parts["alignment"] or 0.0,
            ssim=check.parts["ssim"] or 0.0,
            lpips=check.parts["lpips"],
            preview=single_preview(views) if single and views is not None and score > above else None,
            grid_preview=grid_preview(views) if grid and views is not None and score > above else None,
            gates=check.gates,
        )

    @property
    def generators(self) -> list[Generator]:
        """Both, or the one that is for texts and pictures alike."""
        return [self.text] if self.text is self.image else [self.text, self.image]

    def _generator(self, job: Job) -> Generator:
        return self.text if job.request.image is None else self.image

    def _by_generator(self, jobs: list[Job]) -> list[tuple[Generator, list[Job]]]:
        """Each generator that has any of these jobs, with its jobs."""
        groups = [(each, [job for job in jobs if self._generator(job) is each]) for each in self.generators]
        return [(generator, own) for generator, own in groups if own]

    def bring_onto_device(self, generator: Generator) -> None:
        """If generators take turns, offload the other one and load this one."""
        if self._take_turns and self._loaded is not generator:
            self._loaded = None
            for other in self.generators:  # also one that was partly loaded when memory was full
                if other is not generator:
                    other.offload()
            release_cache()
            generator.onload()
            self._loaded = generator

    def reload(self, max_batch: int) -> None:
        """Load the generators again, for at most ``max_batch`` at once. Frees the CUDA graphs captured for more."""
        self._set_limits(max_batch)
        self._loaded = None
        for generator in self.generators:
            generator.offload()
        release_cache()
        if not self._take_turns:
            for generator in self.generators:
                generator.onload()

    def _waiting_for_device(self, jobs: list[Job]) -> list[Job]:
        """The jobs that wait for the device, because the first job, the oldest, has it for the other generator.

        A generator keeps the device until all its jobs that are older than the other's first are done. So none starves.
        """
        if not self._take_turns or not jobs:
            return []
        turn = self._generator(jobs[0])
        try:
            self.bring_onto_device(turn)
        except Exception as error:  # fails this generator's jobs alone; if memory is full they are retried
            for job in jobs:
                if self._generator(job) is turn:
                    job.outcome = error
        return [job for job in jobs if self._generator(job) is not turn]

    def _prepare_works(self, running: list[Job]) -> None:
        fresh = [job for job in running if job.work is None]
        shown = [job for job in fresh if self._generator(job).cutout is not None]  # the others take texts directly
        self._report_truncation(fresh)
        for job, image in self._run("text_to_image", [job for job in shown if job.image is None], self._draw):
            job.image = image
            if job.request.image is None:
                job.preview("text_to_image", 1.0, partial(preview.of_image, image))
        if any(job.paused() for job in fresh):
            return
        # The GPU is still drawing here. Meanwhile the CPU encodes texts and prefetches what does not need the picture.
        for generator, jobs in self._by_generator(fresh):
            self._encode(generator.encode, jobs)
            self._prefetch(generator, jobs)
        for job, cutout in self._run("background", [job for job in shown if job.cutout is None], self._cut_out):
            if isinstance(cutout, Tensor):
                job.cutout = cutout
            else:
                job.reject(str(cutout))
                # How an object is looked for in a picture does not depend on the seed.
                job.report.hopeless = job.request.image is not None
        for job in fresh:
            if not job.paused():
                self._begin([job])

    def _report_truncation(self, jobs: list[Job]) -> None:
        """Report which models truncate a prompt."""
        for job in jobs:
            if (prompt := job.request.prompt) is None or job.report.text_cut:
                continue
            with suppress(Exception):  # a prompt that can not be encoded fails in its stage
                drawn = {}
                if self.text_to_image is not None:
                    drawn = self.text_to_image.truncation(self.text.picture_prompt(prompt))
                job.report.text_cut = drawn | self.text.truncation(prompt) | self.self_check.truncation(prompt)
            if job.report.text_cut:
                tokens = ", ".join(f"{name} {read} of {count}" for name, (read, count) in job.report.text_cut.items())
                log.warning("The prompt is cut (seed %d), tokens read: %s", job.request.seed, tokens)

    def _draw(self, jobs: list[Job]) -> list[Tensor]:
        """The reference images (3, H, W) in 0..1: drawn from text prompts, or the image prompts."""
        requests = [job.request for job in jobs]
        written = [(self.text.picture_prompt(r.prompt), r.seed) for r in requests if r.prompt is not None]
        drawn: Iterator[Tensor] = iter(())
        if written:
            assert self.text_to_image is not None
            drawn = iter(self.text_to_image.generate([text for text, _ in written], [seed for _, seed in written]))
        images = []
        for request in requests:
            if request.image is not None:
                images.append(to_tensor(request.image.convert("RGB")).to(self.device))
            else:
                images.append(next(drawn))
        return images

    def _encode(self, encode: Callable[[Sequence[str]], None], jobs: list[Job]) -> None:
        """Encode the jobs' prompts in one batch, before they are needed."""
        prompts = [job.request.prompt for job in jobs if job.outcome is None]
        if texts := [prompt for prompt in prompts if prompt]:
            # If it fails, the culprit is unknown: each job encodes its own prompt later, and fails by itself.
            with suppress(Exception):
                encode(texts)

    def _prefetch(self, generator: Generator, jobs: list[Job]) -> None:
        for job in jobs:
            if job.outcome is None and job.prefetched is None:
                with suppress(Exception):  # it will fail again when the work begins
                    job.prefetched = generator.prefetch(job.request.prompt or "", job.request.seed)

    def _cut_out(self, jobs: list[Job]) -> list[Tensor | NothingInImage]:
        """The cut-outs (4, S, S) in 0..1, each in its generator's frame. Images of one size are matted in one batch.

        An image prompt with an alpha channel is not matted: alpha is its mask, as in DreamGaussian.
        """
        alphas: dict[Job, Tensor] = {}
        for job in jobs:
            if (mask := _mask(job.request.image)) is not None:
                alphas[job] = mask.to(self.device)
        given, matted = set(alphas), [job for job in jobs if job not in alphas]
        for shape in {job.image.shape for job in matted if job.image is not None}:
            same = [(job, job.image) for job in matted if job.image is not None and job.image.shape == shape]
            removed = self.background.remove(torch.stack([image for _, image in same]))
            alphas |= dict(zip([job for job, _ in same], removed, strict=True))
        cutouts: list[Tensor | NothingInImage] = []
        for job in jobs:
            frame = self._generator(job).cutout
            assert job.image is not None
            assert frame is not None
            try:
                cutouts.append(recentre(job.image, alphas[job], frame.size, frame.border, given=job in given))
            except NothingInImage as nothing:
                cutouts.append(nothing)
        return cutouts

    def _begin(self, jobs: list[Job]) -> None:
        """Begin each job's work, alone."""

        def begin(batch: list[Job]) -> list[Work]:
            return [self._generator(job).begin(_subject(job)) for job in batch]

        for job in jobs:
            job.work_began = time.perf_counter()
            for _, work in self._run(self._generator(job).name, [job], begin):
                job.begin(work)

    def _tick_works(self, running: list[Job]) -> None:
        self._tick([job for job in running if job.outcome is None and job.work is not None])
        self._encode(self.self_check.encode, [job for job in running if job.work is not None and job.ticks == 1])

    def _tick(self, jobs: list[Job]) -> None:
        """Tick every work that is not done, in one call per generator. Take the Gaussians of those that are done."""
        unfinished = []
        for job in jobs:
            assert job.work is not None
            try:
                job.advance(self._generator(job).name, job.work.fraction)
                self._preview(job, job.work)
                if job.work.done:
                    job.gaussians = job.work.gaussians().detach()
                else:
                    unfinished.append(job)
            except NoSplat as reason:
                job.reject(str(reason))
            except Exception as error:
                job.outcome = error
        for generator, own in self._by_generator(unfinished):
            together = [job for job in own if not job.isolated]
            room = self.limit.current
            groups = [together[start : start + room] for start in range(0, len(together), room)]
            groups += [[job] for job in own if job.isolated]
            for group in groups:
                if not self._tick_group(generator, group):
                    release_cache()  # after the except block: the exception's frames held tensors
                    self._begin(group)
        for job in jobs:
            job.report.seconds[self._generator(job).name] = time.perf_counter() - job.work_began

    def _preview(self, job: Job, work: Work) -> None:
        """Report a preview of a work, at preview.STEPS points of its progress."""
        step = int(work.fraction * preview.STEPS)
        if isinstance(work, Visible) and not work.done and step > max(job.shown, 0):
            job.shown = step
            job.preview(self._generator(job).name, work.fraction, lambda: preview.of_gaussians(work.so_far()))

    def _tick_group(self, generator: Generator, group: list[Job]) -> bool:
        """Tick these works together. False when that failed for several, and their works must begin again.

        A failed tick leaves works inconsistent. After an out-of-memory error the batch limit is lowered. After any
        other error the culprit is unknown, so each job is ticked alone from now on.
        """
        try:
            generator.tick([job.work for job in group if job.work is not None])
        except Exception as error:
            if len(group) == 1:
                group[0].outcome = error
                return True
            if is_out_of_memory(error):
                self.limit.out_of_memory(len(group))
            else:
                for job in group:
                    job.isolated = True
            return False
        for job in group:
            job.ticks += 1
        return True

    def _check_results(self, running: list[Job]) -> None:
        finished = [job for job in running if job.gaussians is not None]
        for job, check in self._run("self_check", finished, self._judge):
            try:
                deliver(job, check)
            except Exception as error:
                job.outcome = error

    def _judge(self, jobs: list[Job]) -> list[Check]:
        splats = []
        for job in jobs:
            request = job.request
            picture = request.image if request.target is None else request.target
            prompt = request.prompt if picture is None else picture
            assert job.gaussians is not None
            assert prompt is not None
            splats.append((job.gaussians, prompt))
        return self.self_check.check_all(splats, fit=True)

    def _run(self, stage: str, jobs: list[Job], work: Callable[[list[Job]], Sequence[T]]) -> list[tuple[Job, T]]:
        """Run a stage, in batches that fit into memory. Returns the jobs that succeeded, with their results.

        When a batch fails, each job is retried alone, to isolate the one that causes it. A job that fails has the error
        as its outcome. The time goes into the jobs' reports.
        """
        jobs = [job for job in jobs if job.is_wanted(stage)]
        started = time.perf_counter()
        done: list[tuple[Job, T]] = []
        try:
            with record_function(stage):  # a named range in profiler traces
                done = list(zip(jobs, in_batches(self.stage_limits.get(stage, self.limit), jobs, work), strict=True))
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

    def _retry_out_of_memory(self, running: list[Job], paused: list[Job]) -> None:
        """Retry jobs that ran out of memory beside others, once, when the others are done.

        They do not wait for paused jobs. Those discard their works and begin them again.
        """
        full = [job for job in running if isinstance(job.outcome, Exception) and is_out_of_memory(job.outcome)]
        going_on = [job for job in running if job.outcome is None]
        for job in full:
            if job.retried or (len(running) == 1 and not paused):
                continue
            for other in paused:
                other.discard_work()
            if paused:
                release_cache()
            if job.gaussians is None:  # a splat that is made already is only checked again
                job.discard_work()
            job.outcome, job.retried, job.waits_for = None, True, list(going_on)
            going_on.append(job)  # several are retried one after the other
            if len(running) > 1:
                self.limit.out_of_memory(len(running))

    def _count_successes(self, running: list[Job]) -> None:
        """Count finished requests for the batch limits of all stages that they went through."""
        for job in running:
            for stage in job.report.seconds if isinstance(job.outcome, Asset) else ():
                self.stage_limits.get(stage, self.limit).succeeded()


def _mask(image: Image.Image | None) -> Tensor | None:
    """The alpha (1, H, W) in 0..1 of a picture; None if no pixel is transparent."""
    if image is None or not image.has_transparency_data:
        return None
    alpha = np.array(image.convert("RGBA").getchannel("A"))
    return torch.from_numpy(alpha)[None].float() / 255 if alpha.min() < 255 else None


def _subject(job: Job) -> Subject:
    """The input of the job's work. ``prefetched`` is handed over, because it can be used once."""
    prefetched, job.prefetched = job.prefetched, None
    return Subject(job.request.prompt or "", job.cutout, job.request.seed, prefetched)
