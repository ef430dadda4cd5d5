"""The validator's count of accepted results, and what it tells of those whose answers were lost."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurons.miner.records.verdicts import WINDOW_S, Span, Window, is_penalty


@pytest.mark.parametrize(
    ("left", "elapsed", "declined"),
    [
        (880.0, 20.0, True),
        (270.0, 30.0, False),
        (300.0, 600.0, None),  # of 900 s, or a whole one of 300 s
        (300.0, 440.0, False),
    ],
)
def test_a_declined_result_s_cooldown_is_three_times_as_long(left: float, elapsed: float, declined: bool) -> None:
    assert is_penalty(left, elapsed, usual=300.0) is declined


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 60), st.floats(0, 0.5))
def test_the_count_never_tells_what_is_not_so(seed: int, before: int, lost: float) -> None:
    """A validator's own list of finish times, and answers of which some are lost."""
    randomness = random.Random(seed)
    at = 1_800_000_000.0
    finished = deque(sorted(int(at - randomness.uniform(0, WINDOW_S)) for _ in range(before)))
    window, unsettled, truth = Window(), [], []
    window.answered(at, len(finished))
    for _ in range(120):
        at += randomness.choice([300.0, 300.0, 330.0, 900.0])
        accepted = randomness.random() < 0.7
        if accepted:
            finished.append(int(at))
        while finished and finished[0] <= int(at) - WINDOW_S:
            finished.popleft()
        here = at + randomness.uniform(0, 2)  # when its answer is here
        span = Span(here - 5, here)
        if randomness.random() < lost:
            unsettled.append(span)
            truth.append(accepted)
            continue
        verdicts = window.answered(here, len(finished), span if accepted else None, unsettled)
        # Of several in a row it is their number that is known, and not which.
        assert sum(verdict is True for verdict in verdicts) <= sum(truth)
        assert sum(verdict is not False for verdict in verdicts) >= sum(truth)
        assert len(truth) != 1 or verdicts[0] in (None, truth[0])
        unsettled, truth = [], []


def test_a_count_that_fell_for_no_reason_tells_nothing() -> None:
    window = Window()
    for number in range(10):
        window.answered(300.0 * number, number + 1, Span(300.0 * number - 5, 300.0 * number))
    assert window.answered(3000.0, 8, Span(2995.0, 3000.0), [Span(2700.0, 2710.0)]) == [None]
    # And what it says from then on is right again.
    assert window.answered(3300.0, 9, None, [Span(3100.0, 3110.0)]) == [True]
    assert window.answered(3600.0, 10, Span(3595.0, 3600.0), [Span(3400.0, 3410.0)]) == [False]


@pytest.mark.parametrize("count", [-(2**53), -1, 0, 2**53])
def test_a_hostile_count_is_survived(count: int) -> None:
    window = Window()
    for number in range(3):
        window.answered(300.0 * number, count, Span(300.0 * number - 5, 300.0 * number), [Span(0.0, 1.0)])
    assert len(window) <= WINDOW_S
