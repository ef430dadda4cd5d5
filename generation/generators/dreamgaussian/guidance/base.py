"""The protocols of guidance by diffusion models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Guidance(Protocol):
    """A model that scores renders of many scenes in one call.

    A condition is an opaque tensor for one scene. Conditions of several scenes are stacked along a new axis 0.
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

        `render` returns the renders. It may synchronise with the device, so it is called after everything else has been
        launched. `noise_levels` (S,) are in 0..1 (1 = pure noise). Noise is drawn from each scene's own generator.
        """
        ...

    def warm_up(self, scenes: int, guidance_scale: float, progress: Callable[[str], None]) -> None:
        """On a GPU, compile and capture `loss` for up to `scenes` scenes at this scale. Else do nothing."""
        ...

    def offload(self) -> None:
        """See `generation.generators.base.Generator.offload`."""
        ...

    def onload(self) -> None:
        """See `generation.generators.base.Generator.onload`."""
        ...


class TextGuidance(Guidance, Protocol):
    """Guidance by the text prompt. It can also sample views."""

    image_size: int  # pixels, of what `sample` draws

    def encode(self, texts: Sequence[str]) -> None:
        """Encode texts in one batch into the cache that `prepare` reads."""
        ...

    def truncation(self, text: str) -> tuple[int, int] | None:
        """(tokens that are read, tokens of the text) if the text is truncated, else None."""
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
        """Consistent images (V, 3, S, S) in 0..1 of what the condition describes, from poses (V, 4, 4).

        With `first` (3, S, S) the first view is known, and the others are consistent with it. The model must be trained
        for that: it sees this view without noise, at time step 0, and the guidance is towards it, too.
        """
        ...


class ImageGuidance(Guidance, Protocol):
    """Guidance by the reference view."""

    def prepare(self, cutout: Tensor, elevation: float) -> Tensor:
        """The condition of one scene, from its cut-out (4, S, S), RGBA in 0..1, seen from `elevation` (degrees up)."""
        ...
