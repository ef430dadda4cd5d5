"""A task that the miner holds, and the time of its validator's next pull."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from neurons.chain import Neuron
from neurons.protocol import Task

# Validators hand out an organic task for no longer. A later result still counts, but holding costs a second for each.
USEFUL_AGE_S = 300.0


def usable_threshold(announced: float, own: float) -> float:
    """The score to reach: the higher one, or our `own` if the `announced` one is out of reach for any result."""
    return max(announced, own) if math.isfinite(announced) and announced <= 1 else own


@dataclass(frozen=True, eq=False)
class Assignment:
    """One task of one validator. Times are unix seconds of the miner's steady clock.

    `settled` gets the time from which the validator may be asked again.
    """

    validator: Neuron
    task: Task
    threshold: float
    pulled_at: float
    free_until: float = 0.0  # holding it longer delays the validator's next task by as much
    settled: asyncio.Future[float] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self, ask_again_at: float) -> None:
        """Ends the assignment. `ask_again_at`: unix seconds of the steady clock. Later calls change nothing."""
        # Nobody waits any more when the miner is stopping.
        if not self.settled.done():
            self.settled.set_result(ask_again_at)
