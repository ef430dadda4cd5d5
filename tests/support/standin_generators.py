"""Two generators that are not the project's, to go through its door.

``ball``: a ball of the picture's colour, in one tick; or of the colour that words name, without a picture.
``sculpture``: the same in 40 ticks, each of which moves it, from a prefetched start; it runs out of memory with three
works at once. A seed's result is always the same.

``KINDS`` is to be added to the table. ``python -m tests.support.standin_generators MODULE ARGUMENT...`` runs
a module with them there.
"""

from __future__ import annotations

import pkgutil
import runpy
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from generation.generators import kinds
from generation.generators.base import Checkpoint, CutoutFrame, Parts, Subject
from generation.generators.kinds import Kind
from generation.schema.options import GeneratorOptions, Template
from generation.splats.gaussians import Gaussians
from tests.support.standins import COLOURS, ball_of

FRAME = CutoutFrame(48, 0.25)


class StandInOptions(GeneratorOptions):
    CHECKPOINTS: ClassVar[tuple[str, ...]] = ("clay",)

    prompt_template: Template = "{prompt}"
    gaussians: int = Field(8000, ge=1, le=1_000_000)
    needs_clay: bool = False

    @property
    def checkpoints(self) -> Mapping[str, str]:
        return {"clay": "needs_clay is true"} if self.needs_clay else {}

    def picture_prompt(self, words: str) -> str:
        return self.prompt_template.replace("{prompt}", words)


class BallOptions(StandInOptions):
    generator: Literal["ball"] = "ball"
    from_words: bool = False

    @property
    def draws(self) -> bool:
        return not self.from_words


class SculptureOptions(StandInOptions):
    generator: Literal["sculpture"] = "sculpture"
    ticks: int = Field(40, ge=1, le=1000)
    at_once: int = 2  # more are out of memory


class Clay:
    """What a checkpoint is loaded as."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.name = checkpoint.entry.name


class StandIn:
    """What both share. ``log`` tells what was called, in order."""

    name: str

    def __init__(self, options: Any, parts: Parts) -> None:
        self.options = options
        self.clay = parts.load("clay", Clay) if options.needs_clay else None
        self.cutout: CutoutFrame | None = FRAME if options.draws else None
        self.log: list[tuple[Any, ...]] = []
        self.loaded = True
        self.held = threading.Event()  # while it is not set, ticks take long
        self.held.set()

    def picture_prompt(self, words: str) -> str:
        return self.options.picture_prompt(words)

    def warm_up(self, most: int, progress: Callable[[str], None]) -> None:
        progress(f"warming up the {self.name}")

    def encode(self, texts: Sequence[str]) -> None:
        assert self.loaded
        self.log.append(("encode", *texts))

    def truncation(self, words: str) -> dict[str, tuple[int, int]]:
        return {}

    def offload(self) -> None:
        self.loaded = False
        self.log.append(("offload",))

    def onload(self) -> None:
        self.loaded = True
        self.log.append(("onload",))

    def colour(self, subject: Subject) -> Tensor:
        if subject.cutout is None:
            return torch.tensor(next(rgb for name, rgb in COLOURS.items() if name in subject.words))
        assert subject.cutout.shape == (4, FRAME.size, FRAME.size)
        colour, alpha = subject.cutout[:3].cpu(), subject.cutout[3:].cpu()
        rows, columns = torch.nonzero(alpha[0] > 0.5, as_tuple=True)
        longer = 1 + max(int(rows.max() - rows.min()), int(columns.max() - columns.min()))
        assert abs(longer - FRAME.size * (1 - FRAME.border)) <= 2  # pixels
        return (colour * alpha).sum((1, 2)) / alpha.sum()


class Whole:
    """The ball's work: nothing, then all of it."""

    def __init__(self, subject: Subject, colour: Tensor) -> None:
        self.subject, self.colour = subject, colour
        self.result: Gaussians | None = None

    @property
    def fraction(self) -> float:
        return float(self.done)

    @property
    def done(self) -> bool:
        return self.result is not None

    def gaussians(self) -> Gaussians:
        assert self.result is not None
        return self.result


class Ball(StandIn):
    name = "ball"

    def prefetch(self, words: str, seed: int) -> None:
        return None

    def begin(self, subject: Subject) -> Whole:
        self.log.append(("begin", subject.words))
        return Whole(subject, self.colour(subject))

    def tick(self, works: Sequence[Whole]) -> None:
        assert self.loaded
        self.log.append(("tick", *(work.subject.words for work in works)))
        for work in works:
            generator = torch.Generator().manual_seed(work.subject.seed)
            work.result = ball_of(work.colour, self.options.gaussians, generator)


class Growing:
    """The sculpture's work."""

    def __init__(self, subject: Subject, colour: Tensor, generator: torch.Generator, ticks: int, count: int) -> None:
        self.subject = subject
        self.ticked, self._ticks = 0, ticks
        self._generator = generator
        self._result = ball_of(colour, count, generator)

    @property
    def fraction(self) -> float:
        return self.ticked / self._ticks

    @property
    def done(self) -> bool:
        return self.ticked >= self._ticks

    def step(self) -> None:
        assert not self.done
        self.ticked += 1
        self._result.means += 1e-3 * torch.randn(1, 3, generator=self._generator)

    def gaussians(self) -> Gaussians:
        return self._result


class Sculpture(StandIn):
    name = "sculpture"

    def prefetch(self, words: str, seed: int) -> torch.Generator:
        assert self.loaded
        self.log.append(("prefetch", words))
        return torch.Generator().manual_seed(seed)

    def begin(self, subject: Subject) -> Growing:
        self.log.append(("begin", subject.words, subject.prefetched is not None))
        generator = subject.prefetched or torch.Generator().manual_seed(subject.seed)
        return Growing(subject, self.colour(subject), generator, self.options.ticks, self.options.gaussians)

    def tick(self, works: Sequence[Growing]) -> None:
        assert self.loaded
        self.log.append(("tick", *(work.subject.words for work in works)))
        if not self.held.is_set():
            self.held.wait(0.01)
        for number, work in enumerate(works):
            if number >= self.options.at_once:  # the first ones are half changed by then
                raise torch.OutOfMemoryError("CUDA out of memory")
            work.step()


def load_ball(options: BallOptions, parts: Parts) -> Ball:
    return Ball(options, parts)


def load_sculpture(options: SculptureOptions, parts: Parts) -> Sculpture:
    return Sculpture(options, parts)


KINDS = {
    "ball": Kind(BallOptions, "tests.support.standin_generators:load_ball"),
    "sculpture": Kind(SculptureOptions, "tests.support.standin_generators:load_sculpture"),
}


if __name__ == "__main__":
    kinds.KINDS.update(pkgutil.resolve_name("tests.support.standin_generators:KINDS"))  # not of this copy of the module
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
