"""Builds the pipeline: loads the models that the settings need, and the generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import torch
import transformers

from generation.generators import kinds
from generation.generators.base import Checkpoint, Generator, Parts
from generation.pipeline.batch_limit import is_out_of_memory
from generation.pipeline.pipeline import Pipeline
from generation.pipeline.warm_up import warm_up
from generation.schema.memory_class import GIB
from generation.settings import Settings
from generation.splats.rasterize import warm_up as warm_up_rasteriser
from generation.stages.background import BackgroundRemover
from generation.stages.self_check import SelfCheck
from generation.stages.text_to_image import TextToImage
from generation.weights import local_folder, lookup
from generation.weights.strict import naming


class NotEnoughMemory(Exception):
    """The GPU has too little memory to start. The message says how much there is, and what to do."""


def load(settings: Settings, progress: Callable[[str], None] = lambda text: None, warm: bool = True) -> Pipeline:
    """Load every model that ``settings`` need onto ``settings.device``. ``progress`` is called with a text per step.

    With ``warm`` the pipeline is warmed up, too. Downloads nothing. Raises WeightsError when a checkpoint is missing or
    can not be used, and NotEnoughMemory.
    """
    with enough_memory(settings):
        return _load(settings, progress, warm)


@contextmanager
def enough_memory(settings: Settings) -> Iterator[None]:
    """Raise an out-of-memory error within it as NotEnoughMemory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise NotEnoughMemory(_advice(settings)) from error


def _in_use(device: str) -> str:
    """Who has the GPU's memory. Nothing where it is too full for CUDA to tell."""
    try:
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
    except RuntimeError:
        return ""
    others = max(0, total - free - own)
    return (
        f"; {own / GIB:.1f} GiB are this process's, and {others / GIB:.1f} its CUDA context's and other programs', "
        f"of {total / GIB:.1f}"
    )


def _advice(settings: Settings) -> str:
    classes = settings.models.memory_classes
    least = {each.name: each.least_gib for each in classes}
    smaller = [each.name for each in classes if each.least_gib < least.get(settings.memory_class or "", 0.0)]
    if smaller:
        todo = f"take a smaller memory class: --memory-class {max(smaller, key=least.__getitem__)}"
    else:
        todo = f"there is no smaller memory class; another generator may need less than {settings.config.name}"
    return (
        f"the GPU's memory is full, even for one request at a time (memory class {settings.memory_class}: "
        f"{settings.memory_reason}){_in_use(settings.device)}. If other programs use the GPU, stop them. Else {todo}"
    )


def _load(settings: Settings, progress: Callable[[str], None], warm: bool) -> Pipeline:
    _quiet_libraries()
    models, device = settings.models, settings.device
    choices = {**models.needed(settings.options, settings.image_options), **models.optional}
    entries = {stage: lookup(choice) for stage, choice in choices.items()}
    folders = {stage: local_folder(entry) for stage, entry in entries.items()}

    @contextmanager
    def loading(stage: str) -> Iterator[None]:
        progress(f"loading {entries[stage].name} for {stage} onto {device}")
        with naming(entries[stage]):
            yield

    text_to_image = None
    if "text_to_image" in folders:
        with loading("text_to_image"):
            text_to_image = TextToImage.load(folders["text_to_image"], models.text_to_image, device)
    with loading("background"):
        background = BackgroundRemover.load(folders["background"], models.background, device)
    checkpoints = {
        name: Checkpoint(folders[name], entries[name], choice, device)
        for name, choice in models.of_generators.items()
        if name in folders
    }
    parts = Parts(checkpoints, background.remove, device, progress, models.offload_generators)
    text, image = load_generators(settings, parts)
    for stage in ("clip", *models.optional):
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
    warm_up_rasteriser(device)
    take_turns = models.offload_generators
    pipeline = Pipeline(text_to_image, background, text, image, self_check, device, about, models.max_batch, take_turns)
    if warm:
        warm_up(pipeline, progress)
    return pipeline


def load_generators(settings: Settings, parts: Parts) -> tuple[Generator, Generator]:
    """The generators for texts and for pictures; the same object if their options are equal. Raises WeightsError.

    With ``offload_generators`` both are offloaded, so that they are never on the device together.
    """
    made: list[Generator] = []
    for options in (settings.options, settings.image_options):
        if made and options == settings.options:
            made.append(made[0])
            continue
        made.append(kinds.load(options, parts))
        if settings.models.offload_generators:
            made[-1].offload()
    text, image = made
    return text, image


def _quiet_libraries() -> None:
    """Turn off progress bars, and warnings that quote prompts."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
