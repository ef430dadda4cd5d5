"""Offloading: a model that is on its GPU only while it works, so that others can use that memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offloaded:
    """A frozen model whose parameters stay in pinned memory of the CPU, and are copied to its device when it works.

    The parameters never change. So offloading only drops the copies on the device. Buffers, the scales of 4-bit weights
    and some of what was joined of weights (``TextProjections``, ``fuse_encoder``: a tenth of a model) stay there.
    """

    def __init__(self, model: nn.Module, device: str | torch.device) -> None:
        """``device`` is the one that ``model`` works on. Until the first ``offload`` the model stays where it is."""
        self._model = model
        self._device = torch.device(device)
        self._pinned: list[tuple[nn.Parameter, Tensor]] = []
        self._is_loaded = True

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
        if not self._pinned:
            self._pin()
        self._is_loaded = False
        for parameter, pinned in self._pinned:
            parameter.data = pinned

    def _pin(self) -> None:
        self._model.to(self._device)  # the buffers
        for parameter in self._model.parameters():
            copy = parameter.data.cpu()
            self._pinned.append((parameter, copy.pin_memory() if self._device.type == "cuda" else copy))
