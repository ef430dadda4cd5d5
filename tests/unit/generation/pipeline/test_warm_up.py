"""Starting on a GPU with too little memory."""

import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from generation.generators.kinds import load_models
from generation.pipeline import assemble
from generation.pipeline import pipeline as pipeline_module
from generation.pipeline.pipeline import Pipeline
from generation.pipeline.warm_up import warm_up
from generation.schema.results import Asset, Report
from generation.settings import CONFIGS
from tests.support.standins import Painter, WhiteIsBackground, colour_check

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 400.00 MiB.\nmore")


class Activations:
    """What the frames of a failed warm-up hold."""


class Narrow:
    """A generator with memory for so many at once. ``log`` tells of all of them."""

    name = "narrow"

    def __init__(self, room: int, log: list[Any], loaded: bool = True) -> None:
        self.room, self.log, self.loaded = room, log, loaded
        self.held: weakref.ref[Activations] | None = None

    def warm_up(self, most: int, progress: Callable[[str], None]) -> None:
        assert self.loaded
        activations = Activations()
        self.held = weakref.ref(activations)
        self.log.append(most)
        if most > self.room:
            raise torch.OutOfMemoryError(str(FULL))

    def offload(self) -> None:
        self.loaded = False

    def onload(self) -> None:
        self.loaded = True

    def encode(self, texts: list[str]) -> None:
        pass


def made(text: Narrow, image: Narrow, monkeypatch: pytest.MonkeyPatch, turns: bool = False, most: int = 4) -> Pipeline:
    text_generator: Any = text
    image_generator: Any = image
    painter: Any = Painter()
    matting: Any = WhiteIsBackground()
    painter.warm_up = matting.warm_up = lambda count: None
    check: Any = colour_check()
    check.warm_up = check.encode = lambda counted: None
    pipeline = Pipeline(painter, matting, text_generator, image_generator, check, "cpu", [], most, turns)
    pipeline.device = "cuda"
    monkeypatch.setattr(pipeline, "generate", lambda requests: [Asset(b"", Report(0, rejected="finite: no"))])
    monkeypatch.setattr(pipeline_module, "release_cache", lambda: None)
    return pipeline


def test_it_starts_for_as_many_at_once_as_there_is_memory_for(monkeypatch, caplog):
    log: list[Any] = []
    text, image = Narrow(4, log), Narrow(1, log)
    pipeline = made(text, image, monkeypatch)
    released = []

    def release_cache() -> None:
        released.append((image.held and image.held(), text.loaded, image.loaded))

    monkeypatch.setattr(pipeline_module, "release_cache", release_cache)
    warm_up(pipeline)
    assert log == [4, 4, 2, 2, 1, 1]
    assert pipeline.limit.maximum == pipeline.limit.current == 1
    assert all(limit.maximum == 1 for limit in pipeline.stage_limits.values())
    assert text.loaded
    assert image.loaded
    # What the failed one held is free by then, and graphs are, which know where weights are.
    assert released == [(None, False, False)] * 2
    assert "Out of GPU memory while starting for 4 at once, now for 2: CUDA out of memory. Tried" in caplog.text
    assert caplog.text.count("The first splat was rejected, as those of requests may be: finite: no") == 2


def test_generators_that_take_turns_still_do(monkeypatch):
    log: list[Any] = []
    text, image = Narrow(4, log, loaded=False), Narrow(2, log, loaded=False)
    pipeline = made(text, image, monkeypatch, turns=True)
    warm_up(pipeline)
    assert log == [4, 4, 2, 2]
    assert (text.loaded, image.loaded) == (True, False)


def test_a_stage_that_has_no_memory_for_one_gets_that_of_graphs_for_many(monkeypatch):
    log: list[Any] = []
    text = Narrow(4, log)
    pipeline = made(text, text, monkeypatch)

    def draw(count: int) -> None:
        log.append(f"draw {count}")
        if pipeline.limit.maximum > 2:
            raise torch.OutOfMemoryError(str(FULL))

    monkeypatch.setattr(pipeline.text_to_image, "warm_up", draw)
    warm_up(pipeline)
    assert log == [4, "draw 1", 2, "draw 1", "draw 2"]


def test_one_alone_without_memory_is_an_error(monkeypatch):
    log: list[Any] = []
    pipeline = made(Narrow(0, log), Narrow(4, log), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        warm_up(pipeline)
    assert log == [4, 2, 1]


def test_other_errors_are_not_tried_again(monkeypatch):
    log: list[Any] = []
    pipeline = made(Narrow(4, log), Narrow(4, log), monkeypatch)
    monkeypatch.setattr(pipeline, "generate", lambda requests: [RuntimeError("no kernel image")])
    with pytest.raises(RuntimeError, match="no kernel image"):
        warm_up(pipeline)
    assert log == [4, 4]


@pytest.mark.parametrize(
    ("name", "todo"),
    [
        ("80gb", "take a smaller memory class: --memory-class 48gb"),
        ("48gb", "take a smaller memory class: --memory-class 24gb"),
        ("16gb", "there is no smaller memory class; another generator may need less than lgm.yaml"),
    ],
)
def test_what_is_to_do_where_the_memory_is_too_small_is_told(name, todo, monkeypatch):
    settings: Any = SimpleNamespace(
        models=load_models(CONFIGS / "models_full.yaml"), memory_class=name, memory_reason="the GPU has 44.00 GiB",
        device="cuda:0", config=Path("configs/lgm.yaml"),
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 44 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40 * 2**30)

    def load(*_: Any) -> Pipeline:
        raise FULL

    monkeypatch.setattr(assemble, "_load", load)
    with pytest.raises(assemble.NotEnoughMemory) as caught:
        assemble.load(settings)
    said = str(caught.value)
    assert f"memory class {name}: the GPU has 44.00 GiB" in said
    assert "40.0 GiB are this process's, and 3.0 its CUDA context's and other programs', of 44.0. If" in said
    assert said.endswith(todo)
    assert caught.value.__cause__ is FULL

    def full(device: str) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", full)  # for its context, too
    with pytest.raises(assemble.NotEnoughMemory, match=r"44\.00 GiB\)\. If other programs"):
        assemble.load(settings)


def test_other_errors_of_loading_stay_as_they_are(monkeypatch):
    def load(*_: Any) -> Pipeline:
        raise ValueError("no")

    monkeypatch.setattr(assemble, "_load", load)
    nothing: Any = None
    with pytest.raises(ValueError, match="no"):
        assemble.load(nothing)
