"""What tests ask of tensors."""

from __future__ import annotations

from torch import Tensor


def gradient(tensor: Tensor) -> Tensor:
    """What was accumulated for it: there must be one."""
    assert tensor.grad is not None
    return tensor.grad
