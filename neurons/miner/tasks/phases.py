"""Spreads pulls over time, so that each task has the generators for itself for as long as holding it is free."""

from __future__ import annotations

from collections.abc import Callable, Collection

from neurons.miner.assignment import Assignment

# Share of the time per validator in a cooldown that is used. The rest is slack.
USED = 0.9
# Shares of the distance that is aimed at. A validator nearer to another one than the first share is moved to where it
# has at least the second. Nearly enough is left alone: each delay on the network would undo an exact distance.
KEPT, ENOUGH = 0.33, 0.7


class Phases:
    """Moves pulls apart in time.

    Validators that were asked at the same moment end their cooldowns at the same moment, and their tasks would share
    the free time. Asking one of them later costs that delay once: its later cooldowns then end at other moments.
    """

    def __init__(self, free_seconds: Callable[[Assignment], float]) -> None:
        """`free_seconds`: how long a validator's task profits from having the generators for itself."""
        self._free_seconds = free_seconds
        self._asked_at: dict[str, float] = {}  # hotkey -> when it is asked next; only where moving pays
        self._validators = 1

    def keep(self, hotkeys: Collection[str]) -> None:
        """Forgets all validators but these."""
        self._validators = max(len(hotkeys), 1)
        self._asked_at = {hotkey: at for hotkey, at in self._asked_at.items() if hotkey in hotkeys}

    def apart(self, assignment: Assignment, at: float) -> float:
        """The unix time at which to ask the validator of a finished task again; it allows that from `at` on."""
        hotkey, free = assignment.validator.hotkey, self._free_seconds(assignment)
        self._asked_at.pop(hotkey, None)
        if free > 0:
            period = at - assignment.pulled_at
            gap = min(free, USED * period / self._validators)
            at = _apart(at, period, gap, list(self._asked_at.values()))
            self._asked_at[hotkey] = at
        return at


def _apart(at: float, period: float, gap: float, others: list[float]) -> float:
    """The first moment from `at` on that is about `gap` away from all `others`, which recur every `period` seconds."""

    def distance(moment: float) -> float:
        return min(abs((moment - other + period / 2) % period - period / 2) for other in others)

    if not others or gap <= 0 or distance(at) >= KEPT * gap:
        return at
    after = sorted((other - at) % period for other in others)
    middles = [
        (one + other) / 2 for one, other in zip([after[-1] - period, *after], [*after, after[0] + period], strict=True)
    ]
    later = [at + moment for moment in sorted([*(each + gap for each in after), *middles]) if moment > 0]
    return next((moment for moment in later if distance(moment) >= ENOUGH * gap), at)
