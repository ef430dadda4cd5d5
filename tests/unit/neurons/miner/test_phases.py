"""When validators are asked, so that their tasks do not come together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurons.chain import Neuron
from neurons.miner.assignment import Assignment
from neurons.miner.tasks.phases import Phases
from neurons.protocol import TextTask

PERIOD, FREE = 300.0, 25.0
moments = st.floats(0, PERIOD, exclude_max=True)


def assignment(hotkey: int, pulled_at: float) -> Assignment:
    validator = Neuron(hotkey, str(hotkey), "127.0.0.1", 9000 + hotkey, 1e4, serving=True)
    return Assignment(validator, TextTask(id="1", prompt="p"), 0.6, pulled_at, settled=None)  # type: ignore[arg-type]


class Cycles:
    """Validators whose cooldowns take PERIOD; `phases` says when each is asked."""

    def __init__(self, starts: list[float], free: float = FREE) -> None:
        self.phases = Phases(lambda _: free)
        self.phases.keep([str(hotkey) for hotkey in range(len(starts))])
        self.asked = dict(enumerate(starts))
        self.waited = 0.0

    def run(self, cycles: int) -> None:
        for _ in range(cycles * len(self.asked)):
            hotkey = min(self.asked, key=lambda each: self.asked[each])
            at = self.asked[hotkey]
            self.asked[hotkey] = self.phases.apart(assignment(hotkey, at), at + PERIOD)
            waited = self.asked[hotkey] - at - PERIOD
            assert -1e-6 < waited < 1.2 * PERIOD
            self.waited += waited

    @property
    def nearest(self) -> float:
        inside = sorted(at % PERIOD for at in self.asked.values())
        return min(b - a for a, b in zip(inside, [*inside[1:], inside[0] + PERIOD], strict=True))


def test_in_step_they_are_moved_apart_once() -> None:
    cycles = Cycles([0.0] * 12)
    cycles.run(2)
    assert cycles.nearest >= 15
    assert cycles.waited < 12 * PERIOD / 2  # half a task each
    before = cycles.waited
    cycles.run(10)
    assert cycles.waited == pytest.approx(before, abs=1e-6)


def test_more_than_there_is_free_time_for_share_the_cooldown() -> None:
    cycles = Cycles([0.0] * 24)
    cycles.run(3)
    assert cycles.nearest >= 0.6 * PERIOD / 24


def test_few_are_moved_no_further_than_is_of_use() -> None:
    cycles = Cycles([0.0, 0.0, 0.0])
    cycles.run(3)
    assert cycles.waited <= 3 * FREE


def test_those_that_get_one_candidate_are_left_as_they_are() -> None:
    cycles = Cycles([0.0] * 12, free=0.0)
    cycles.run(3)
    assert cycles.waited == 0.0


@given(st.lists(moments, min_size=1, max_size=12))
def test_from_wherever_they_begin_they_come_to_rest(starts: list[float]) -> None:
    cycles = Cycles(starts)
    cycles.run(5)
    before = cycles.waited
    cycles.run(3)
    assert cycles.waited == pytest.approx(before, abs=1e-6)
