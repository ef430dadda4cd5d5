"""How many candidates are planned for a task."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from neurons.chain import Neuron
from neurons.miner.assignment import Assignment
from neurons.miner.tasks.best_of import BestOf, Round
from neurons.protocol import TextTask

VALIDATOR = Neuron(1, "1", "127.0.0.1", 9001, 1e4, serving=True)


@dataclass
class Capacity:
    """One service that takes its tasks one after the other."""

    seconds: float

    def seconds_without_wait(self) -> float | None:
        return self.seconds

    def candidates_within(self, seconds: float, tasks: int) -> int:
        return int(seconds / (self.seconds * tasks))


class Settled:
    """In place of a future."""

    def add_done_callback(self, callback: object) -> None:
        assert callable(callback)
        callback(None)


def planned(seconds: float, free: float, tasks: int) -> Round | None:
    """For a task that may be held for `free` seconds and whose submission takes none."""
    assignment = Assignment(
        VALIDATOR, TextTask(id="1", prompt="p"), 0.6, 0.0, free_until=free, settled=Settled()  # type: ignore[arg-type]
    )  # fmt: skip
    best_of = BestOf("auto", Capacity(seconds), workers=4, now=lambda: 0.0)
    best_of.submitted(assignment)
    return best_of.round(assignment, 0, tasks)


def test_a_round_is_short_where_another_task_may_come() -> None:
    found = planned(1.0, free=30.0, tasks=1)
    assert found is not None
    assert (found.candidates, found.seconds) == (5, 5.5)


@pytest.mark.parametrize("tasks", [2, 3, 4])
def test_tasks_that_take_turns_have_a_candidate_each(tasks: int) -> None:
    """With a round as short as for one task alone none of them ever got a second candidate."""
    found = planned(6.0, free=60.0, tasks=tasks)
    assert found is not None
    assert found.candidates == 1
    assert found.seconds <= 59.0


def test_what_does_not_fit_is_not_planned() -> None:
    assert planned(6.0, free=10.0, tasks=4) is None
