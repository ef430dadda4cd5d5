"""What every 3D generator is to the pipeline.

A generator makes 3D Gaussians of words or of a cut-out picture. It knows nothing of HTTP, queues, retries, thresholds
or other stages: drawing, matting, the check, batching, out-of-memory errors and cancellation are the pipeline's.

To add one: a folder here with its options (a ``GeneratorOptions``, in a module without torch) and a function
``load(options, parts)``; an entry in ``kinds.KINDS``; its checkpoints in ``generation.weights.registry`` and in a
models file under the names that its options' ``CHECKPOINTS`` have.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from generation.schema.options import ModelChoice
from generation.splats.gaussians import Gaussians
from generation.weights.registry import Entry
from generation.weights.strict import naming

T = TypeVar("T")

#: alphas (B, 1, H, W) in 0..1 of images (B, 3, H, W) in 0..1
RemoveBackground = Callable[[Tensor], Tensor]


class CutoutFrame(NamedTuple):
    """How a generator wants its picture: the object in the middle of a transparent square."""

    size: int  # pixels of a side
    border: float  # share of a side that the object's longer side leaves free


class NoSplat(Exception):
    """No splat can be made of a subject, though nothing failed. The words are the reason of the request's rejection."""


@dataclass(frozen=True)
class Subject:
    """What one splat is to be made of."""

    words: str  # "" of a picture that was sent
    cutout: Tensor | None  # (4, S, S) RGBA in 0..1, not premultiplied, in the generator's frame; None: words alone
    seed: int  # 0..2**32 - 1
    prefetched: Any = None  # what ``Generator.prefetch`` gave for these words and this seed; it is used once


class Work(Protocol):
    """One splat in the making, with all its state: random generators of its own, tensors on the device."""

    @property
    def fraction(self) -> float:
        """How much of it is done, 0..1; never falls."""
        ...

    @property
    def done(self) -> bool:
        """Whether the Gaussians are final; no tick comes any more."""
        ...

    def gaussians(self) -> Gaussians:
        """The result, on the device: y up, the front towards +z. To be asked for when it is ``done``.

        Raises NoSplat where there is none: the request is rejected then, for that reason.
        """
        ...


@runtime_checkable
class Visible(Protocol):
    """A ``Work`` that can be looked at while it is made."""

    def so_far(self) -> Gaussians:
        """As they are now, on the device; they may change with the next tick."""
        ...


class Generator(Protocol):
    """A 3D method, loaded. All calls come from one thread, and most of what they do may still be under way on the GPU.

    What comes of a subject depends on its words, its picture and its seed, up to rounding; never on what is made beside
    it, before it, or with how many. So random numbers come from generators seeded for the work alone.
    """

    @property
    def name(self) -> str:
        """Of the stage, as reports, events and metrics call it: lower case, the same for all requests."""
        ...

    @property
    def cutout(self) -> CutoutFrame | None:
        """The frame of its pictures; None where words alone are enough, and none is drawn for them."""
        ...

    def picture_prompt(self, words: str) -> str:
        """What text to image is asked for, where words become a picture."""
        ...

    def warm_up(self, most: int, progress: Callable[[str], None]) -> None:
        """On a GPU, compile what can be, for up to ``most`` works at once; ``progress`` is told each step in words.

        The pipeline makes a whole splat afterwards. Does nothing on a CPU.
        """
        ...

    def encode(self, texts: Sequence[str]) -> None:
        """Words of subjects to come: encoded together they cost the time of one. Only a saving; may do nothing."""
        ...

    def truncation(self, words: str) -> dict[str, tuple[int, int]]:
        """Of each model that reads only the beginning of it: tokens that it reads, and of how many."""
        ...

    def prefetch(self, words: str, seed: int) -> Any:
        """What can be done for one subject before there is a picture, while the GPU draws it; None if nothing.

        It comes back as ``Subject.prefetched``, or is lost: ``begin`` must do without it as well, to the same result.
        """
        ...

    def begin(self, subject: Subject) -> Work:
        """Start a work. What gains from being done for several at once belongs into the first ``tick`` instead."""
        ...

    def tick(self, works: Sequence[Work]) -> None:
        """Bring all works, none of them done, one step on together: an iteration, a flow step, a whole pass.

        A step should take at most some tenths of a second: between two, requests join, leave, and are cancelled. When
        it raises, the works may be half changed: they are thrown away, and begun again each alone, or fewer at once
        when memory was full.
        """
        ...

    def offload(self) -> None:
        """Take the networks off the GPU until ``onload``, into pinned memory; works stay. Without effect when they are.

        Called on small cards only, where another generator has the turn.
        """
        ...

    def onload(self) -> None:
        """Bring the networks back. Without effect when they are there."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Files of a model, on this machine and whole, and how they are to be loaded."""

    folder: Path
    entry: Entry
    choice: ModelChoice
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        dtype: torch.dtype = getattr(torch, self.choice.dtype)
        return dtype


class Parts:
    """What generators are made of: checkpoints, each loaded once whoever asks for it, and the shared matting."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        remove_background: RemoveBackground,
        device: str,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``checkpoints``: those that the generators' options need, by name."""
        self.remove_background = remove_background
        self.device = device
        self._checkpoints = checkpoints
        self._progress = progress
        self._loaded: dict[Hashable, Any] = {}

    def load(self, name: str, build: Callable[[Checkpoint], T]) -> T:
        """What ``build`` makes of the checkpoint ``name``; the same object for the same two.

        So generators share a model by asking with the same module-level function or classmethod, and may change nothing
        about it then. Raises WeightsError naming the checkpoint and what to do.
        """
        if (name, build) not in self._loaded:
            checkpoint = self._checkpoints[name]
            self._progress(f"loading {checkpoint.entry.name} for {name} onto {self.device}")
            with naming(checkpoint.entry):
                self._loaded[name, build] = build(checkpoint)
        loaded: T = self._loaded[name, build]
        return loaded
