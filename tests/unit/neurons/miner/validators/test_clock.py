"""Validators' clocks: learned from Date headers, and no pull before its time."""

from __future__ import annotations

import logging
import math
import random
import time
from email.utils import formatdate

import pytest

from neurons.miner.status import ClockLog
from neurons.miner.validators.clock import (
    DEFAULT_PAUSE_S,
    MAX_COOLDOWN_S,
    MIN_PAUSE_S,
    UNKNOWN_CLOCK_MARGIN_S,
    ValidatorClocks,
    steady_time,
)

START = 1_800_000_000.25


class Time:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now() -> Time:
    return Time()


@pytest.fixture
def clocks(now: Time) -> ValidatorClocks:
    return ValidatorClocks(now)


def answer(clocks: ValidatorClocks, now: Time, offset: float, age: float = 0.0, delay: float = 0.2) -> None:
    """An answer of a validator whose clock is `offset` ahead, with a header that is `age` seconds old."""
    sent = now.now
    date = formatdate(sent + delay / 2 + offset - age, usegmt=True)
    now.now += delay
    clocks.answered("5V", date, sent, now.now)


@pytest.mark.parametrize("offset", [0.0, 0.49, -0.51, 5.0, -5.0, 3600.0, -3600.0, 864_000.0, -864_000.0])
def test_a_pull_is_never_early_and_soon_after_the_cooldown(clocks: ValidatorClocks, now: Time, offset: float) -> None:
    random_ = random.Random(1)
    late = []
    for _ in range(60):
        answer(clocks, now, offset, age=random_.random())
        cooldown_until = int(now.now + offset + 300)
        late.append(clocks.next_pull_at("5V", cooldown_until) + offset - cooldown_until)
        assert 0 <= late[-1] < 2.3
        now.now += 300 * random_.random()
    assert sum(late[30:]) / 30 < 0.8


def test_without_a_date_header_there_is_a_margin(clocks: ValidatorClocks, now: Time) -> None:
    clocks.answered("5V", None, now.now, now.now)
    clocks.answered("5V", "yesterday", now.now, now.now)
    clocks.answered("5V", formatdate(0), now.now, now.now)
    clocks.answered("5V", "Fri, 31 Dec 9999 23:59:59 GMT", now.now, now.now)
    cooldown_until = int(now.now) + 300
    assert clocks.next_pull_at("5V", cooldown_until) == pytest.approx(cooldown_until + UNKNOWN_CLOCK_MARGIN_S, abs=0.1)


def test_an_answer_that_took_long_hides_nothing_that_was_known(clocks: ValidatorClocks, now: Time) -> None:
    """Its header is as old as the scoring took, for all that we know."""
    for offset in (40.0, 40.5):
        answer(clocks, now, offset)
        sent = now.now
        now.now += 280.0
        clocks.answered("5V", formatdate(now.now + offset, usegmt=True), sent, now.now)
        assert clocks.ahead("5V", int(now.now + offset + 300)) == pytest.approx(300, abs=3)
        assert clocks.highest_offset("5V") == pytest.approx(offset, abs=4)


def test_a_clock_that_was_set_is_learned_anew(clocks: ValidatorClocks, now: Time) -> None:
    for offset in (0.0, 100.0, -100.0):
        for _ in range(5):
            answer(clocks, now, offset)
        cooldown_until = int(now.now + offset + 300)
        assert 0 <= clocks.next_pull_at("5V", cooldown_until) + offset - cooldown_until < 1.5
        assert clocks.ahead("5V", cooldown_until) == pytest.approx(300, abs=3)
        assert 0 <= clocks.highest_offset("5V") - offset < 4


def test_a_clock_that_drifts_is_followed(clocks: ValidatorClocks, now: Time) -> None:
    for minute in range(24 * 12):
        offset = -4e-5 * 300 * minute
        answer(clocks, now, offset, age=random.Random(minute).random())
        cooldown_until = int(now.now + offset + 300)
        assert clocks.next_pull_at("5V", cooldown_until) + offset - 4e-5 * 300 >= cooldown_until
        now.now += 300


def answer_on_the_second(clocks: ValidatorClocks, now: Time, offset: float) -> None:
    """An answer without any delay, with a header that is neither old nor truncated: it tells the clock exactly."""
    now.now = math.ceil(now.now + offset) - offset
    clocks.answered("5V", formatdate(round(now.now + offset), usegmt=True), now.now, now.now)


DRIFT = 9e-5  # of two clocks, in seconds per second: just within what is reckoned with


def test_a_pull_is_not_early_after_hours_without_an_answer_of_a_slow_clock(clocks: ValidatorClocks, now: Time) -> None:
    answer_on_the_second(clocks, now, 0.0)
    told_at = now.now
    now.now += 3 * 3600
    cooldown_until = int(now.now) + 10
    at = clocks.next_pull_at("5V", cooldown_until)
    assert cooldown_until <= at - DRIFT * (at - told_at) < cooldown_until + 1


def test_a_pull_is_not_early_after_a_long_cooldown_of_a_slow_clock(clocks: ValidatorClocks, now: Time) -> None:
    answer_on_the_second(clocks, now, 0.0)
    told_at = now.now
    cooldown_until = int(now.now) + 3 * 3600
    at = clocks.next_pull_at("5V", cooldown_until)
    assert cooldown_until <= at - DRIFT * (at - told_at) < cooldown_until + 1


@pytest.mark.parametrize("answers", [1, 2])
def test_a_fast_clock_is_never_further_ahead_than_is_said(clocks: ValidatorClocks, now: Time, answers: int) -> None:
    began = now.now
    for _ in range(answers):
        answer_on_the_second(clocks, now, DRIFT * (now.now - began))
        now.now += 86_400
    assert 0 <= clocks.highest_offset("5V") - DRIFT * (now.now - began) < 6


def test_a_fresh_header_counts_after_hours_beside_a_stale_one_of_a_slow_clock(
    clocks: ValidatorClocks, now: Time
) -> None:
    answer_on_the_second(clocks, now, 0.0)
    now.now += 3 * 3600
    offset = -DRIFT * 3 * 3600
    answer(clocks, now, offset, age=2.0)
    cooldown_until = int(now.now) + 300
    assert 0 <= clocks.next_pull_at("5V", cooldown_until) + offset - cooldown_until < 0.5


def test_a_refusal_by_a_slow_clock_is_no_lie(clocks: ValidatorClocks, now: Time) -> None:
    answer_on_the_second(clocks, now, 0.0)
    now.now += 3 * 3600
    cooldown_until = int(now.now)
    now.now = cooldown_until + 0.5  # by the validator's clock half a second before it
    clocks.refused("5V", cooldown_until, now.now)
    answer_on_the_second(clocks, now, -DRIFT * 3 * 3600)
    assert clocks.next_pull_at("5V", int(now.now) + 300) < int(now.now) + 302


def test_a_header_that_lies_is_found_out_by_a_refusal(clocks: ValidatorClocks, now: Time) -> None:
    """The header is right by our clock, but the rules go by one that is 20 s behind."""
    violations = 0
    for _ in range(20):
        answer(clocks, now, 0.0)
        cooldown_until = int(now.now - 20 + 300)
        while True:
            now.now = clocks.next_pull_at("5V", cooldown_until)
            if now.now - 20 >= cooldown_until:
                break
            violations += 1
            clocks.refused("5V", cooldown_until, now.now)
            answer(clocks, now, 0.0)
    assert violations <= 5  # 5 s each, until the 20 s are known


def test_a_refusal_in_a_cooldown_that_was_not_known_teaches_nothing_wrong(clocks: ValidatorClocks, now: Time) -> None:
    answer(clocks, now, 0.0)
    cooldown_until = int(now.now) + 200
    before = clocks.next_pull_at("5V", cooldown_until)
    clocks.refused("5V", cooldown_until, now.now)
    assert clocks.next_pull_at("5V", cooldown_until) == before


@pytest.mark.parametrize("cooldown_until", [0, -5, 1, -(10**30), 10**400 * -1])
def test_a_cooldown_long_past_is_a_short_pause(clocks: ValidatorClocks, now: Time, cooldown_until: int) -> None:
    clocks.refused("5V", cooldown_until, now.now)
    assert clocks.next_pull_at("5V", cooldown_until) == now.now + DEFAULT_PAUSE_S


def test_a_cooldown_just_over_is_over(clocks: ValidatorClocks, now: Time) -> None:
    answer(clocks, now, 0.0)
    assert clocks.next_pull_at("5V", int(now.now) - 8) == now.now + MIN_PAUSE_S


@pytest.mark.parametrize("cooldown_until", [10**12, 10**30, 10**400])
def test_no_cooldown_is_for_ever(clocks: ValidatorClocks, now: Time, cooldown_until: int) -> None:
    clocks.refused("5V", cooldown_until, now.now)
    assert clocks.next_pull_at("5V", cooldown_until) == now.now + MAX_COOLDOWN_S


def test_clocks_of_those_who_left_are_forgotten(clocks: ValidatorClocks, now: Time) -> None:
    answer(clocks, now, 3600.0)
    clocks.keep({"5W"})
    cooldown_until = int(now.now) + 300
    assert clocks.next_pull_at("5V", cooldown_until) == pytest.approx(cooldown_until + UNKNOWN_CLOCK_MARGIN_S, abs=0.1)


def test_our_own_time_does_not_step(monkeypatch: pytest.MonkeyPatch) -> None:
    before = steady_time()
    assert before == pytest.approx(time.time(), abs=60)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= steady_time() - before < 10


# --- this machine's clock, by the validators'


def hear(clocks: ValidatorClocks, now: Time, offsets: list[float]) -> None:
    """Two answers of each of these validators, as whole seconds of their clocks."""
    for _ in range(2):
        for number, offset in enumerate(offsets):
            sent = now.now
            now.now += 0.25
            clocks.answered(f"5{number}", formatdate(sent + 0.1 + offset, usegmt=True), sent, now.now)


@pytest.mark.parametrize("offset", [-3600.0, -20.0, 0.0, 20.0, 3600.0])
def test_several_validators_tell_how_far_off_this_machine_s_clock_is(now: Time, offset: float) -> None:
    clocks = ValidatorClocks(now, wall=now)
    hear(clocks, now, [offset, offset + 0.4])
    assert clocks.machine_is_behind() is None  # two may both lie
    hear(clocks, now, [offset, offset + 0.4, offset - 0.4, 86_000.0])
    assert clocks.machine_is_behind() == pytest.approx(offset, abs=2)


def test_a_machine_s_clock_that_is_set_right_is_right(now: Time) -> None:
    wall = 0.0
    clocks = ValidatorClocks(now, wall=lambda: now.now + wall)
    hear(clocks, now, [3600.0] * 5)
    assert clocks.machine_is_behind() == pytest.approx(3600, abs=2)
    wall = 3600.0
    assert clocks.machine_is_behind() == pytest.approx(0, abs=2)
    # What pulls rely on goes by the steady clock, which knows nothing of it.
    assert clocks.next_pull_at("50", int(now.now + 3600 + 300)) == pytest.approx(now.now + 300, abs=3)


def test_a_clock_that_is_off_is_said_once_and_when_it_is_right_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neurons.miner.status")
    clock_log = ClockLog()
    for behind in (None, 0.0, 4.9, 37.2, 36.8, 4.0, 37.0, None, 2.0, -1.0, -40.0, -41.0):
        clock_log.update(behind)
    assert [record.getMessage() for record in caplog.records] == [
        "This machine's clock is 37 s behind the validators' clocks: set it",
        "This machine's clock agrees with the validators' again",
        "This machine's clock is 40 s ahead of the validators' clocks: set it",
    ]
