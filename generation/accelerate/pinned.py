"""Asynchronous copies to a GPU, through pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_async(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy of the CPU's ``tensor`` on ``device``. The CPU does not wait for the GPU.

    From memory that is not pinned PyTorch would wait until the GPU has finished all earlier work.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
