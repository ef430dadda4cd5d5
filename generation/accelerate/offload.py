"""A model that is on its GPU only while it works, so that others have its memory meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Resting:
    """Keeps a frozen model's parameters in pinned memory of the CPU, from where they come back at the bus's full speed.

    They never change, so leaving the GPU is forgetting them there. Buffers, and the scales of 4-bit weights, stay.
    """

    def __init__(self, model: nn.Module, device: str | torch.device) -> None:
        """`model` is anywhere, and rests from now on; `device` is where it works."""
        self._device = torch.device(device)
        pin = self._device.type == "cuda"
        model.to(self._device)  # all that is no parameter
        self._at_rest: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in model.parameters():
            at_rest = parameter.data.cpu()
            self._at_rest.append((parameter, at_rest.pin_memory() if pin else at_rest))
        self._is_awake = True
        self.rest()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The model is on its device inside."""
        try:
            self.wake()
            yield
        finally:
            self.rest()

    def wake(self) -> None:
        """Bring it onto its device, unless it is there."""
        if not self._is_awake:
            for parameter, at_rest in self._at_rest:
                parameter.data = at_rest.to(self._device, non_blocking=True)
            self._is_awake = True

    def rest(self) -> None:
        """Have it off its device. What was captured in a CUDA graph can not be replayed any more."""
        self._is_awake = False
        for parameter, at_rest in self._at_rest:
            parameter.data = at_rest
