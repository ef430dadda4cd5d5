"""The times of a flow's steps, and guidance at them.

t goes from 1, noise, to 0. Guidance here is (1 + s) * conditional - s * unconditional: s = 5 is what others call 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """From time ``t`` to ``following``; ``guided`` where the unconditional velocity is needed, too."""

    t: float
    following: float
    guided: bool

    def apply(self, x: Tensor, conditional: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
        """The sample one step on, by the velocities with the picture and without it."""
        velocity = conditional if unconditional is None else (1 + guidance) * conditional - guidance * unconditional
        return x - (self.t - self.following) * velocity


def schedule(steps: int, rescale: float, interval: tuple[float, float]) -> list[Step]:
    """Steps that are spent where t is large, by ``rescale``; guided where their t is in ``interval``, both ends in it.

    In float64: of 12 steps one is at exactly 0.5 then.
    """
    times = np.linspace(1, 0, steps + 1)
    times = rescale * times / (1 + (rescale - 1) * times)
    pairs = zip(times[:-1].tolist(), times[1:].tolist(), strict=True)
    return [Step(t, following, interval[0] <= t <= interval[1]) for t, following in pairs]
