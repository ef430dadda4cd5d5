"""When a validator may be asked again, by that validator's own clock.

`cooldown_until` is in whole seconds of the validator's clock, which may differ from ours. Every HTTP answer says what
time it is over there, in its Date header: whole seconds, and as servers write it once a second, up to two seconds old.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from email.utils import parsedate_to_datetime

# Seconds after an answer without a usable time to come back.
DEFAULT_PAUSE_S = 30.0
# A cooldown that is announced as over for at most this long is over. One that ended earlier makes no sense.
JUST_OVER_S = 60.0
# Least seconds between two pulls.
MIN_PAUSE_S = 1.0
# Most seconds until the next pull, whatever a validator announces: 300 to 3,600 s are normal.
MAX_COOLDOWN_S = 4 * 3600.0
# How far a validator's clock may be behind ours when it does not tell.
UNKNOWN_CLOCK_MARGIN_S = 5.0
# What a clock can say, in unix seconds: 2025 to 2100. How far it is from ours is no measure: ours may be off by years,
# as on a machine that starts without a clock of its own.
PLAUSIBLE = (1_735_689_600, 4_102_444_800)
# Truncated to a second, written once a second, and a bit for a busy server.
MAX_HEADER_AGE_S = 3.0
# Two uncorrected quartz clocks, in seconds per second.
MAX_DRIFT = 1e-4
# Rounding errors of sums of unix times.
ROUNDING_S = 0.01
# With fewer validators the median may be a liar's.
MIN_CLOCKS = 3
# Beyond any date that matters, and within what a float holds exactly: validators may send any integer.
_LAST_SECOND = 1 << 40


_START_NS = time.time_ns() - time.monotonic_ns()


def steady_time_ns() -> int:
    """Unix nanoseconds that never step while this process lives, even if this machine's clock is set.

    A step would cause a pull that is too early, or a nonce that validators refuse as old.
    """
    return _START_NS + time.monotonic_ns()


def steady_time() -> float:
    """The same in seconds."""
    return steady_time_ns() / 1e9


class ValidatorClock:
    """How many seconds a validator's clock is ahead of ours: between `low` and `high`.

    Pulls rely on `low` alone: at the moment of an answer the validator's clock has reached the header's date, however
    old that header is.
    """

    def __init__(self) -> None:
        self.low = -UNKNOWN_CLOCK_MARGIN_S
        self.high = UNKNOWN_CLOCK_MARGIN_S
        self.told_at: float | None = None
        self._header_is_wrong = False

    def answered(self, date: float, sent: float, received: float) -> None:
        """`date`: unix seconds of the Date header; the others are our time at the request and at the answer."""
        low, high = date - received, date + MAX_HEADER_AGE_S - sent
        if self._header_is_wrong or not _is_plausible(date):
            return
        if self.told_at is not None:
            drift = self.drift(received)
            # An earlier header may have been fresher. If the two contradict each other, the clock was set.
            if self.low - drift <= high and low <= self.high + drift:
                low, high = max(low, self.low - drift), min(high, self.high + drift)
        self.low, self.high, self.told_at = low, high, received

    def refused(self, cooldown_until: float, sent: float) -> None:
        """A pull sent at `sent` was too early: the validator's clock was still before `cooldown_until`."""
        high = cooldown_until - sent
        if _is_plausible(cooldown_until) and high < self.low - self.drift(sent) + ROUNDING_S:
            # The validator counts by another clock than its header's.
            self._header_is_wrong |= self.told_at is not None
            self.low, self.high, self.told_at = high - UNKNOWN_CLOCK_MARGIN_S, high, None

    def drift(self, now: float) -> float:
        """By how many seconds the clocks may have drifted apart since the latest answer."""
        return 0.0 if self.told_at is None else MAX_DRIFT * (now - self.told_at)


class ValidatorClocks:
    """The clocks of all validators, by hotkey."""

    def __init__(self, now: Callable[[], float] = steady_time, wall: Callable[[], float] = time.time) -> None:
        """`now` is the steady clock that the miner goes by, `wall` the machine's, which people see and set."""
        self.now = now
        self._wall = wall
        self._clocks: dict[str, ValidatorClock] = {}

    def answered(self, hotkey: str, date: str | None, sent: float, received: float) -> None:
        """To be called with the Date header of every answer of a validator."""
        seconds = _parse_date(date)
        if seconds is not None:
            self._clock(hotkey).answered(seconds, sent, received)

    def refused(self, hotkey: str, cooldown_until: int, sent: float) -> None:
        """To be called when a pull was answered with a cooldown."""
        self._clock(hotkey).refused(_within_reason(cooldown_until), sent)

    def next_pull_at(self, hotkey: str, cooldown_until: int) -> float:
        """Our time from which the validator may be asked again: at its `cooldown_until` or right after it."""
        now, clock = self.now(), self._clock(hotkey)
        at = _within_reason(cooldown_until) - (clock.low - clock.drift(now))
        if at < now - JUST_OVER_S:
            return now + DEFAULT_PAUSE_S
        # The clocks may drift apart on the way there.
        at += MAX_DRIFT * max(at - now, 0.0)
        return min(max(at, now + MIN_PAUSE_S), now + MAX_COOLDOWN_S)

    def ahead(self, hotkey: str, moment: int) -> float:
        """In how many seconds it is `moment`, in unix seconds, by the validator's clock; negative: it was."""
        clock = self._clock(hotkey)
        return _within_reason(moment) - self.now() - (clock.low + clock.high) / 2

    def keep(self, hotkeys: Collection[str]) -> None:
        """Forgets the clocks of all others."""
        self._clocks = {hotkey: clock for hotkey, clock in self._clocks.items() if hotkey in hotkeys}

    def highest_offset(self, hotkey: str) -> float:
        """How many seconds the validator's clock is ahead of our steady one, at most."""
        clock = self._clock(hotkey)
        return clock.high + clock.drift(self.now())

    def machine_is_behind(self) -> float | None:
        """How many seconds this machine's clock is behind the validators', negative when it is ahead.

        The median of their clocks; None while fewer than MIN_CLOCKS have told.
        """
        offsets = [(clock.low + clock.high) / 2 for clock in self._clocks.values() if clock.told_at is not None]
        if len(offsets) < MIN_CLOCKS:
            return None
        return statistics.median(offsets) + self.now() - self._wall()

    def _clock(self, hotkey: str) -> ValidatorClock:
        return self._clocks.setdefault(hotkey, ValidatorClock())


def _is_plausible(moment: float) -> bool:
    return PLAUSIBLE[0] <= moment <= PLAUSIBLE[1]


def _within_reason(cooldown_until: int) -> int:
    return min(max(cooldown_until, 0), _LAST_SECOND)


def _parse_date(header: str | None) -> float | None:
    try:
        return parsedate_to_datetime(header).timestamp() if header else None
    except (ValueError, TypeError, OverflowError):
        return None
