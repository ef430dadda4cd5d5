"""What a UNet makes of a sample before it first looks at the text, once for both halves of a guided batch.

Classifier-free guidance gives a UNet each sample twice, with the text and without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


class SharedStart:
    """Has the residual blocks before the first attention to the text, and the self-attention there, compute one half of
    the batch for both.

    Only inside `halves_are_alike`: samples, steps and classes of the halves must be the same there.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.alike = False
        for level in unet.down_blocks:
            transformers = getattr(level, "attentions", None)
            for i in range(1 if transformers else len(level.resnets)):
                level.resnets[i] = _Once(level.resnets[i], self)
            if transformers:
                attention = transformers[0].transformer_blocks[0].attn1
                attention.set_processor(OnceAttention(attention.processor, self))
                break

    @contextmanager
    def halves_are_alike(self) -> Iterator[None]:
        self.alike = True
        try:
            yield
        finally:
            self.alike = False


class OnceAttention:
    """An attention processor: `attend` for the first half of the batch where both are alike."""

    def __init__(self, attend: Any, start: SharedStart) -> None:
        self.attend = attend
        self._start = start

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._start.alike:
            result: Tensor = self.attend(attn, hidden_states, *args, **kwargs)
            return result
        return _twice(self.attend(attn, _half(hidden_states), *args, **kwargs))


class _Once(nn.Module):
    def __init__(self, block: nn.Module, start: SharedStart) -> None:
        super().__init__()
        self.block = block
        self._start = start

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if not self._start.alike:
            result: Tensor = self.block(x, temb)
            return result
        return _twice(self.block(_half(x), _half(temb)))


def _half(x: Tensor) -> Tensor:
    return x.chunk(2)[0]


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])
