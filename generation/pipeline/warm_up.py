"""Warms a pipeline up on a GPU, for as many requests at once as there is memory for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from PIL import Image, ImageDraw

from generation.pipeline.batch_limit import in_batches, is_out_of_memory
from generation.pipeline.pipeline import Pipeline
from generation.schema.results import Request

log = logging.getLogger("generation.pipeline.warm_up")


def warm_up(pipeline: Pipeline, progress: Callable[[str], None] = lambda text: None) -> None:
    """On a GPU, compile everything and make a first splat, so that requests do not pay for it. Else do nothing.

    Where memory runs out, it begins again for half as many at once, and these are the most from then on. Raises any
    other error, and an out-of-memory error with one at once. ``progress`` is called with a text per step.
    """
    if not pipeline.device.startswith("cuda"):
        return
    torch.backends.cudnn.benchmark = True  # few shapes: benchmark the algorithms for each
    while True:
        most = pipeline.limit.maximum
        try:
            _warm_up_generators(pipeline, progress)
            _warm_up_stages(pipeline, progress)
            _make_first_splats(pipeline, progress)
            return
        except Exception as error:
            if not is_out_of_memory(error) or most == 1:
                raise
            reason = str(error).partition("\n")[0]
        log.warning("Out of GPU memory while starting for %d at once, now for %d: %s", most, most // 2, reason)
        pipeline.reload(most // 2)  # after the except block: the exception's frames held tensors


def _warm_up_generators(pipeline: Pipeline, progress: Callable[[str], None]) -> None:
    for generator in pipeline.generators:
        pipeline.bring_onto_device(generator)
        generator.warm_up(pipeline.limit.maximum, progress)


def _warm_up_stages(pipeline: Pipeline, progress: Callable[[str], None]) -> None:
    """What all generators share, with each number of requests at once."""
    most = pipeline.limit.maximum
    if pipeline.text_to_image is not None:
        progress("compiling text to image, or loading it from its cache")
        # One before several: fewer variants are compiled in this order.
        _warm_up_batches(pipeline, "text_to_image", pipeline.text_to_image.warm_up, range(1, most + 1))
    progress("looking for the fastest kernels of background removal and self-check")
    _warm_up_batches(pipeline, "background", pipeline.background.warm_up, range(most, 0, -1))
    _warm_up_batches(pipeline, "self_check", pipeline.self_check.warm_up, range(most, 0, -1))
    pipeline.bring_onto_device(pipeline.text)
    for count in range(1, most + 1):
        texts = [f"{number} of {count}" for number in range(count)]
        pipeline.text.encode(texts)
        pipeline.self_check.encode(texts)


def _warm_up_batches(pipeline: Pipeline, stage: str, work: Callable[[int], None], counts: Iterable[int]) -> None:
    """Run each batch size of a stage once, because cuDNN chooses algorithms per batch size."""

    def each(batch: list[int]) -> list[int]:
        work(len(batch))
        return batch

    for count in counts:
        in_batches(pipeline.stage_limits[stage], list(range(count)), each)


def _make_first_splats(pipeline: Pipeline, progress: Callable[[str], None]) -> None:
    progress("making a first splat of a text and of a picture, to warm up")
    disc = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(disc).ellipse((64, 64, 192, 192), "red")
    for request in (Request(prompt="a red cube", seed=0, threshold=0.0), Request(image=disc, seed=0, threshold=0.0)):
        (outcome,) = pipeline.generate([request])
        if isinstance(outcome, Exception):
            raise outcome
        if outcome.report.rejected is not None:
            log.warning("The first splat was rejected, as those of requests may be: %s", outcome.report.rejected)
