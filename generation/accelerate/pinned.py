"""Copies to a GPU that the CPU does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The CPU's `tensor` on `device`, when the GPU gets there.

    From memory that is not pinned, PyTorch waits until the GPU has done all that it was asked for before.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
