"""Offloading: a model that is on its GPU only while it works, so that others can use that memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offloaded:
    """A frozen model whose parameters stay in pinned memory of the CPU, and are copied to its device when it works.

    The parameters never change. So offloading only drops the copies on the device. Buffers and the scales of 4-bit
    weights stay there.
    """

    def __init__(self, model: nn.Module, device: str | torch.device) -> None:
        """``model`` may be on any device, and is offloaded from now on. ``device`` is the one that it works on."""
        self._device = torch.device(device)
        pin = self._device.type == "cuda"
        model.to(self._device)  # the buffers
        self._pinned: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in model.parameters():
            copy = parameter.data.cpu()
            self._pinned.append((parameter, copy.pin_memory() if pin else copy))
        self._is_loaded = True
        self.offload()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within this context the model is on its device."""
        try:
            self.onload()
            yield
        finally:
            self.offload()

    def onload(self) -> None:
        """Copy the parameters to the device. Does nothing when they are there."""
        if not self._is_loaded:
            for parameter, pinned in self._pinned:
                parameter.data = pinned.to(self._device, non_blocking=True)
            self._is_loaded = True

    def offload(self) -> None:
        """Free the device's copies. A CUDA graph that was captured before can not be replayed any more."""
        self._is_loaded = False
        for parameter, pinned in self._pinned:
            parameter.data = pinned
