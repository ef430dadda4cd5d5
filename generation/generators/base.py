"""The protocol that every 3D generator keeps.

A generator makes 3D Gaussians from a text or from a cut-out picture. It knows nothing of HTTP, queues, retries,
thresholds or other stages. Text to image, matting, the self-check, batching, out-of-memory errors and cancellation are
the pipeline's.

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
    """The cut-out that a generator takes: the object centred in a transparent square."""

    size: int  # pixels of a side
    border: float  # share of a side that is empty, along the object's longer side


class NoSplat(Exception):
    """No splat can be made from a subject, though nothing failed. Its message becomes the reason of the rejection."""


@dataclass(frozen=True)
class Subject:
    """The input for one splat."""

    words: str  # the text prompt; "" for an image prompt
    cutout: Tensor | None  # (4, S, S) RGBA in 0..1, not premultiplied, in the generator's frame; None: text only
    seed: int  # 0..2**32 - 1
    prefetched: Any = None  # from ``Generator.prefetch`` for these words and this seed; used once


class Work(Protocol):
    """One splat in progress, with all its state: its own random generators, its tensors on the device."""

    @property
    def fraction(self) -> float:
        """Progress, 0..1. Never decreases."""
        ...

    @property
    def done(self) -> bool:
        """Whether the Gaussians are final. Then it is ticked no more."""
        ...

    def gaussians(self) -> Gaussians:
        """The result, on the device: y up, the front towards +z. Only called when the work is ``done``.

        Raises NoSplat if there is none. Then the request is rejected for that reason.
        """
        ...


@runtime_checkable
class Visible(Protocol):
    """A ``Work`` that can be rendered before it is done."""

    def so_far(self) -> Gaussians:
        """The current Gaussians, on the device. The next tick may change them."""
        ...


class Generator(Protocol):
    """A loaded 3D method. All calls come from one thread. They may return before the GPU has finished.

    The result for a subject depends on its text, its picture and its seed only, up to rounding: not on other works, on
    earlier ones, or on the batch size. So each work has its own seeded random generators.
    """

    @property
    def name(self) -> str:
        """Name of the stage in reports, events and metrics: lower case, the same for all requests."""
        ...

    @property
    def cutout(self) -> CutoutFrame | None:
        """The frame of its cut-outs. None if it takes texts directly; then no picture is drawn for them."""
        ...

    def picture_prompt(self, words: str) -> str:
        """The prompt for text to image, where a text becomes a picture first."""
        ...

    def warm_up(self, most: int, progress: Callable[[str], None]) -> None:
        """On a GPU, compile and capture for up to ``most`` works at once. ``progress`` is called with a text per step.

        Afterwards the pipeline makes a whole splat. Does nothing on a CPU.
        """
        ...

    def encode(self, texts: Sequence[str]) -> None:
        """Encode texts of coming subjects in one batch, which takes as long as one. An optimisation; may do nothing."""
        ...

    def truncation(self, words: str) -> dict[str, tuple[int, int]]:
        """For each model that truncates the text: name -> (tokens that it reads, tokens of the text)."""
        ...

    def prefetch(self, words: str, seed: int) -> Any:
        """Whatever can be prepared before the picture exists, while the GPU draws it; None if nothing can.

        It is passed on as ``Subject.prefetched``, or dropped. ``begin`` must give the same result without it.
        """
        ...

    def begin(self, subject: Subject) -> Work:
        """Start a work. Whatever is faster in a batch belongs into the first ``tick`` instead."""
        ...

    def tick(self, works: Sequence[Work]) -> None:
        """Advance all works, none of them done, by one step in one batch: an iteration, a flow step, a whole pass.

        A step should take at most some tenths of a second. Requests join, leave and are cancelled between steps. When
        it raises, the works may be inconsistent. They are discarded and begun again: in smaller batches after an
        out-of-memory error, otherwise each alone.
        """
        ...

    def offload(self) -> None:
        """Move the networks from the GPU into pinned memory, until ``onload``. Works stay. Idempotent.

        Only called on small cards, when another generator needs the memory.
        """
        ...

    def onload(self) -> None:
        """Move the networks back onto the GPU. Idempotent."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """The complete local files of a model, and how to load them."""

    folder: Path
    entry: Entry
    choice: ModelChoice
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        dtype: torch.dtype = getattr(torch, self.choice.dtype)
        return dtype


class Parts:
    """What generators are built from: checkpoints, each loaded once, and the shared matting."""

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        remove_background: RemoveBackground,
        device: str,
        progress: Callable[[str], None] = lambda text: None,
        offload: bool = False,
    ) -> None:
        """``checkpoints``: those that the generators' options need, by name. ``device``: such as "cpu" or "cuda:1".

        ``offload``: memory is scarce. What works once a request should be on the device only then.
        """
        self.remove_background = remove_background
        self.device = device
        self.offload = offload
        self._checkpoints = checkpoints
        self._progress = progress
        self._loaded: dict[Hashable, Any] = {}

    def load(self, name: str, build: Callable[[Checkpoint], T]) -> T:
        """``build(checkpoint)`` of the checkpoint ``name``. The same name and ``build`` give the same object.

        So generators share a model when they pass the same module-level function or classmethod. They must not modify
        it then. Raises WeightsError naming the checkpoint and what to do.
        """
        if (name, build) not in self._loaded:
            checkpoint = self._checkpoints[name]
            self._progress(f"loading {checkpoint.entry.name} for {name} onto {self.device}")
            with naming(checkpoint.entry):
                self._loaded[name, build] = build(checkpoint)
        loaded: T = self._loaded[name, build]
        return loaded
