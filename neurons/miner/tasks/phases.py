"""When validators are asked: apart, so that each task has the generators for itself for as long as it may be held."""

from __future__ import annotations

from collections.abc import Callable, Collection

from neurons.miner.assignment import Assignment

# Of what there is for each validator in a cooldown. The rest is room to move.
USED = 0.9
# Shares of the distance that is aimed at. Who is nearer to another one than the first is moved, for an exact distance
# would be lost to every delay on the network. Where he is moved the second is enough.
KEPT, ENOUGH = 0.33, 0.7


class Phases:
    """Validators that were asked at the same moment end their cooldowns at the same moment, so that their tasks share
    the seconds that cost nothing. Asking one of them later costs that delay once: the next cooldowns end apart.
    """

    def __init__(self, free_seconds: Callable[[Assignment], float]) -> None:
        """`free_seconds`: how long it pays to have the generators for a validator's task alone."""
        self._free_seconds = free_seconds
        self._asked_at: dict[str, float] = {}  # hotkey -> when it is, or was, to be asked; of those that it pays for
        self._validators = 1

    def keep(self, hotkeys: Collection[str]) -> None:
        """All validators that are asked; others are forgotten."""
        self._validators = max(len(hotkeys), 1)
        self._asked_at = {hotkey: at for hotkey, at in self._asked_at.items() if hotkey in hotkeys}

    def apart(self, assignment: Assignment, at: float) -> float:
        """The unix time from which to ask the validator of a finished task, which allows it from `at` on."""
        hotkey, free = assignment.validator.hotkey, self._free_seconds(assignment)
        self._asked_at.pop(hotkey, None)
        if free > 0:
            period = at - assignment.pulled_at
            gap = min(free, USED * period / self._validators)
            at = _apart(at, period, gap, list(self._asked_at.values()))
            self._asked_at[hotkey] = at
        return at


def _apart(at: float, period: float, gap: float, others: list[float]) -> float:
    """The first moment from `at` on that is about `gap` from all others, each of which comes again after `period`."""

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
