"""How learning rates and noise levels change over an optimisation."""

from __future__ import annotations

import math

from torch import Tensor


def position_lr(step: int, initial: float, final: float, max_steps: int) -> float:
    """Learning rate of the means at `step`: log-linear from `initial` to `final` over `max_steps`, as 3DGS has it.

    The delay that 3DGS also knows (`position_lr_delay_mult`) acts over no steps in DreamGaussian: it is left out.
    """
    if initial == 0 or final == 0:
        return initial
    share = min(max(step / max_steps, 0.0), 1.0)
    return math.exp((1 - share) * math.log(initial) + share * math.log(final))


def noise_level(step_ratio: Tensor, start: float = 1.0) -> Tensor:
    """Noise levels in 0..1 for score distillation, linearly from `start` to 0 over the optimisation."""
    return start * (1 - step_ratio)


def render_size(step_ratio: float) -> int:
    """Pixels of the sides of the views that the guidance sees, as DreamGaussian has it."""
    return 128 if step_ratio < 0.3 else 256 if step_ratio < 0.6 else 512
