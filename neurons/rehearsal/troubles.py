"""What a validator that keeps the rules can still put a miner through. Times in seconds of the validators' clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Trouble:
    """`score` is given to everything in place of the scoring service's: None for no answer.

    `hangs_up`: the connection of every other task's submissions is dropped when scoring begins, or in place of the
    answer. Scoring goes on, as it does in a validator whose client has gone.
    `crashes`: in the middle of every third task, without a state file; or soon after its result, with an older state.
    `unknown_seconds`: for how long it has not heard of the miner yet.
    """

    score: float | Literal["asked for"] | None = "asked for"
    scoring_seconds: float = 0.0
    hangs_up: Literal["never", "while scoring", "for the answer"] = "never"
    crashes: Literal["never", "without state", "with old state"] = "never"
    unknown_seconds: float = 0.0


CRASH_EVERY_TASKS = 3
CRASH_DELAY_S = 2.0
OUTAGE_S = 20.0

NONE = Trouble()
TROUBLES: dict[str, Trouble] = {
    "declines": Trouble(score=0.3),
    "scoring-unavailable": Trouble(score=None),
    "scoring-raises": Trouble(score=0.0),
    # Sent again at once, the result finds the lock; sent again after it, two are scored side by side.
    "locks": Trouble(scoring_seconds=20.0, hangs_up="while scoring"),
    "overlaps": Trouble(scoring_seconds=75.0, hangs_up="while scoring"),
    "scores-slowly": Trouble(scoring_seconds=200.0),
    "loses-answers": Trouble(hangs_up="for the answer"),
    "crashes-without-state": Trouble(crashes="without state"),
    "crashes-with-old-state": Trouble(crashes="with old state"),
    "knows-nobody-yet": Trouble(unknown_seconds=600.0),
}
