"""Builds the pipeline: loads the models that the settings need, and the generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import transformers

from generation.generators import kinds
from generation.generators.base import Checkpoint, Generator, Parts
from generation.pipeline.pipeline import Pipeline
from generation.settings import Settings
from generation.splats.rasterize import warm_up
from generation.stages.background import BackgroundRemover
from generation.stages.self_check import SelfCheck
from generation.stages.text_to_image import TextToImage
from generation.weights import local_folder, lookup
from generation.weights.strict import naming


def load(settings: Settings, progress: Callable[[str], None] = lambda text: None, warm: bool = True) -> Pipeline:
    """Load every model that ``settings`` need onto ``settings.device``. ``progress`` is called with a text per step.

    With ``warm`` the pipeline is warmed up, too. Downloads nothing. Raises WeightsError when a checkpoint is missing or
    can not be used.
    """
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
    text, image = load_generators(settings, Parts(checkpoints, background.remove, device, progress))
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
    take_turns = models.offload_generators
    pipeline = Pipeline(text_to_image, background, text, image, self_check, device, about, models.max_batch, take_turns)
    if warm:
        pipeline.warm_up(progress)
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
