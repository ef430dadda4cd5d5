"""What the optimiser asks of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Guidance(Protocol):
    """A model that scores renders of many scenes in one call.

    A condition is what it knows of one scene, opaque to the caller; conditions of several scenes stack along a new
    axis 0.
    """

    views: int  # views of one scene that `loss` takes together

    def loss(
        self,
        render: Callable[[], Tensor],
        camera_to_world: Tensor,
        conditions: Tensor,
        noise_levels: Tensor,
        generators: list[torch.Generator],
        guidance_scale: float,
    ) -> Tensor:
        """Loss (S,) of renders (S * views, 3, H, W) in 0..1 from OpenGL poses (S * views, 4, 4).

        `render` gives them. It may wait for the device, as nothing else in here does, so it is called last: all else
        has been asked for by then. `noise_levels` (S,) are in 0..1 (1 = pure noise); noise is drawn from each scene's
        own generator.
        """
        ...

    def warm_up(self, scenes: int, guidance_scale: float, progress: Callable[[str], None]) -> None:
        """On a GPU, compile and capture `loss` for up to so many scenes at once, at this scale; else nothing."""
        ...

    def offload(self) -> None:
        """See `generation.generators.base.Generator.offload`."""
        ...

    def onload(self) -> None:
        """See `generation.generators.base.Generator.onload`."""
        ...


class TextGuidance(Guidance, Protocol):
    """One that reads the prompt, and that can draw views of its own."""

    image_size: int  # pixels, of what `sample` draws

    def encode(self, texts: Sequence[str]) -> None:
        """Encode those that are not known yet together, so that `prepare` finds them."""
        ...

    def truncation(self, text: str) -> tuple[int, int] | None:
        """Tokens that are read and all tokens, of a text that is longer than what is read; else None."""
        ...

    def prepare(self, prompt: str, negative_prompt: str) -> Tensor:
        """The condition of one scene."""
        ...

    def sample(
        self,
        condition: Tensor,
        camera_to_world: Tensor,
        generator: torch.Generator,
        steps: int,
        guidance_scale: float,
        first: Tensor | None = None,
    ) -> Tensor:
        """Images (V, 3, S, S) in 0..1 of what the condition describes, seen from poses (V, 4, 4) that agree.

        With `first` (3, S, S) the first view is known, and the others are drawn to go with it, by a model that was
        trained for that: it sees this view without noise, at time step 0, and the guidance is towards that, too.
        """
        ...


class ImageGuidance(Guidance, Protocol):
    """One that sees the reference view."""

    def prepare(self, cutout: Tensor, elevation: float) -> Tensor:
        """The condition of one scene: its cut-out (4, S, S), RGBA in 0..1, seen from `elevation` (degrees, up)."""
        ...
