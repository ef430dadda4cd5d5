"""A validator's task in this miner's hands, and when that validator may be asked again."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field

from neurons.chain import Neuron
from neurons.protocol import Task

# After a task or cooldown that can not be made sense of.
DEFAULT_PAUSE_S = 30.0
# Validators announce 300 to 3,600 s. One that says more is asked again after this all the same.
MAX_COOLDOWN_S = 4 * 3600.0
# `cooldown_until` is in whole seconds of the validator's clock.
CLOCK_MARGIN_S = 1.0


def next_pull_at(cooldown_until: int) -> float:
    """Unix time at which a validator that answered `cooldown_until` may be asked again."""
    now = time.time()
    if cooldown_until <= now:
        return now + DEFAULT_PAUSE_S
    return min(cooldown_until, now + MAX_COOLDOWN_S) + CLOCK_MARGIN_S


def usable_threshold(announced: float, own: float) -> float:
    """The score to reach: the higher one, as long as the validator's can be reached at all."""
    return max(announced, own) if math.isfinite(announced) and announced <= 1 else own


@dataclass(frozen=True, eq=False)
class Assignment:
    """One task of one validator; `settled` becomes the unix time from which the validator may be asked again."""

    validator: Neuron
    task: Task
    threshold: float
    settled: asyncio.Future[float] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self, ask_again_at: float) -> None:
        # Nobody waits any more when the miner is stopping.
        if not self.settled.done():
            self.settled.set_result(ask_again_at)
