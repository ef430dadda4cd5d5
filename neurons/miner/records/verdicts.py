"""What a validator's answers say of a result, also when the answer to the submission was lost.

Names mislead. A declined result comes back with `validation_failed` False and a score of 0. `validation_failed` True
means that the validator's scoring service gave no answer, which costs the miner nothing. An answer whose
`cooldown_until` is not in the future is a repetition: the validator is at work on the result, and looks at no other for
up to LOCK_S; or it has another task for this miner.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neurons.miner.records.events import SubmissionOutcome
from neurons.protocol import Feedback

# From the start of a validation.
LOCK_S = 30.0
# In this time a validator gives a miner at most one task. It is the default, until a validator has told its own.
TASK_COOLDOWN_S = 300.0
# `generations_within_the_window` counts the results of this time.
WINDOW_S = 4 * 3600.0
# How far apart a moment at the validator and its answer's arrival here may be.
ANSWER_S = 5.0


def judge(size: int, feedback: Feedback, ends_task: bool) -> SubmissionOutcome | None:
    """What became of a result of `size` bytes that was sent once; None where the answer is a repetition.

    `ends_task`: the answer has a cooldown that is new and in the future.
    """
    if size == 0:
        return "empty" if ends_task else None
    if feedback.validation_failed:
        return "broken"
    if feedback.task_fidelity_score > 0:
        return "accepted"
    return "declined" if ends_task else None


def is_penalty(cooldown: float, elapsed: float, usual: float) -> bool | None:
    """Whether a cooldown is the one of a declined result; None where that can not be told. All in seconds.

    `cooldown` is what is left of it. The whole of it is three times the `usual` one for a declined result, and began
    when the result was judged, at most `elapsed` seconds ago.
    """
    if cooldown > 1.5 * usual:
        return True
    return False if cooldown + elapsed < 2.5 * usual else None


@dataclass(frozen=True)
class Span:
    """The time in which something happened, in unix seconds by our clock."""

    earliest: float
    latest: float


class Window:
    """The accepted results that one validator counts, followed from answer to answer.

    Its count grows by what it accepts, and shrinks by what gets older than WINDOW_S. We know to within some seconds
    when each counted result was accepted. Of results from before the first answer we know only that they were in the
    window. So the count of the next answer has a lowest and a highest value. What it is beyond that are results that
    were accepted although their answers were lost.
    """

    def __init__(self) -> None:
        # Of the n-th oldest, the earliest and the latest time: both in order, though not of the same result.
        self._earliest: list[float] = []
        self._latest: list[float] = []
        self._heard = False

    def __len__(self) -> int:
        return len(self._earliest)

    def add(self, accepted: Span) -> None:
        """One that a later answer will count."""
        bisect.insort(self._earliest, accepted.earliest)
        bisect.insort(self._latest, accepted.latest)

    def answered(
        self, at: float, count: int, accepted: Span | None = None, unsettled: Sequence[Span] = ()
    ) -> list[bool | None]:
        """Which of the `unsettled` results, sent since the last answer, were accepted; None where that can not be told.

        `count` came in at `at` and includes `accepted`, the result that it was the answer to.
        """
        begin = at - WINDOW_S
        del self._earliest[: (gone := bisect.bisect_right(self._latest, begin - ANSWER_S))]
        del self._latest[:gone]
        may_be_gone = bisect.bisect_right(self._earliest, begin)
        new = count - (accepted is not None)
        more = min(max(new - len(self), 0), len(unsettled))  # at least so many were accepted
        most = min(new - (len(self) - may_be_gone), len(unsettled))
        if not self._heard and new not in (0, len(unsettled)):
            more, most = 0, len(unsettled)  # some are from before we first heard of it
        self._heard = True
        for span in unsettled[:more]:
            # Where not all were accepted it is known how many, and not which.
            self.add(span if more == len(unsettled) else Span(unsettled[0].earliest, unsettled[-1].latest))
        if accepted is not None:
            self.add(accepted)
        if most > more:
            # As many as may have been accepted may have taken the places of the oldest ones.
            self._latest = self._latest[most - more :] + [at] * min(most - more, len(self))
        self._agree_with(count, begin, at, may_be_gone)
        # A count that fell by more than the oldest results: the validator forgot some.
        others = False if 0 <= most <= more else None
        return [True] * more + [others] * (len(unsettled) - more)

    def _agree_with(self, count: int, begin: float, at: float, may_be_gone: int) -> None:
        """Makes this window as long as the validator's `count`, which came in at `at`."""
        # A stranger's number. Nobody has more than one result a second accepted.
        count = min(max(count, 0), int(WINDOW_S))
        gone = min(max(len(self) - count, 0), may_be_gone)
        del self._earliest[:gone], self._latest[:gone]
        # A validator that crashed forgot the newest ones.
        del self._earliest[count:], self._latest[count:]
        missing = count - len(self)
        self._earliest = sorted([begin] * missing + self._earliest)
        self._latest = sorted([at] * missing + self._latest)


class PastSubmission(NamedTuple):
    """A submission of an earlier run, as the ledger has it. `at`: unix seconds when it was over; `seconds` it took.

    `score` is what its answer told. None where that told none, even if the count told that it was accepted.
    """

    at: float
    hotkey: str
    task_id: str
    outcome: str
    seconds: float
    accepted_in_window: int | None
    cooldown: float | None
    score: float | None = None
