"""How many candidates are planned for a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from neurons.chain import Neuron
from neurons.miner.assignment import Assignment
from neurons.miner.tasks.best_of import BestOf, Round
from neurons.protocol import TextTask

TASK = TextTask(id="1", prompt="p")
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

    def add_done_callback(self, callback: Callable[[None], None]) -> None:
        self.callback = callback


def planned(seconds: float, free: float, tasks: int) -> Round | None:
    """For a task that may be held for `free` seconds and whose submission takes none."""
    assignment = Assignment(
        VALIDATOR, TASK, 0.6, 0.0, free_until=free, settled=(settled := Settled())  # type: ignore[arg-type]
    )  # fmt: skip
    best_of = BestOf("auto", Capacity(seconds), workers=4, now=lambda: 0.0)
    best_of.submitted(assignment)
    settled.callback(None)
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


def test_tasks_that_wait_for_a_worker_have_their_share_of_the_time() -> None:
    assert planned(3.0, free=30.0, tasks=4) is not None
    assert planned(3.0, free=30.0, tasks=12) is None


@pytest.mark.parametrize(
    ("took", "reserved"),
    [([2.0, 12.0], 12.0), ([12.0, 2.0], 12.0 - 0.3 * 10.0), ([500.0], 60.0)],
    ids=["longer", "shorter", "hung"],
)
def test_what_a_submission_takes_is_kept_for_the_next_one(took: list[float], reserved: float) -> None:
    at = 0.0
    best_of = BestOf("auto", Capacity(1.0), workers=4, now=lambda: at)
    for seconds in took:
        settled = Settled()
        best_of.submitted(Assignment(VALIDATOR, TASK, 0.6, at, settled=settled))  # type: ignore[arg-type]
        at += seconds
        settled.callback(None)
    # One second more, for validators count in whole ones.
    assert best_of.free_seconds(Assignment(VALIDATOR, TASK, 0.6, at, at + 100.0, settled)) == 99.0 - reserved  # type: ignore[arg-type]


def test_what_does_not_fit_is_not_planned() -> None:
    assert planned(6.0, free=10.0, tasks=4) is None
