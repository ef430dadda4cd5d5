"""What a validator's answers say of a result, also when the one that told was lost.

Names mislead: a declined result comes back with `validation_failed` False and a score of 0, and what does say
`validation_failed` is a validator whose scoring service gave no answer, which costs the miner nothing. An answer whose
`cooldown_until` is not in the future repeats what was said before: the validator is at work on the result (for up to
LOCK_S it looks at no other), or has another task for this miner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neurons.miner.events import SubmissionOutcome
from neurons.protocol import Feedback

# From the start of a validation.
LOCK_S = 30.0
# The validators' default, of one that has not yet told of a cooldown.
TASK_COOLDOWN_S = 300.0
# A declined result's cooldown is three times as long as any other's.
DECLINED_COOLDOWNS = 2.0
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


def is_penalty(cooldown: float, usual: float) -> bool:
    """Whether a cooldown of so many seconds since a result was first sent is that of a declined one.

    The others are over some 300 s after the task was given or the result was judged, and a declined one after 900 s.
    """
    return cooldown > DECLINED_COOLDOWNS * usual


@dataclass(frozen=True)
class Span:
    """The time in which something happened, in unix seconds by our clock."""

    earliest: float
    latest: float


class Window:
    """The accepted results that one validator counts, followed from answer to answer.

    Its count grows by what it accepted and shrinks by what is older than WINDOW_S. What is known of each counted result
    is when it was accepted, to within some seconds; of those that were counted before we first heard of the validator,
    that it was in the window. So from one answer to the next the count has a lowest and a highest value, and what it is
    beyond the highest are results that were accepted without our hearing of it.
    """

    def __init__(self) -> None:
        self._counted: list[Span] = []
        self._heard = False

    def add(self, accepted: Span) -> None:
        """One that a later answer will count."""
        self._counted.append(accepted)

    def answered(
        self, at: float, count: int, accepted: Span | None = None, unsettled: Sequence[Span] = ()
    ) -> list[bool | None]:
        """Which of the `unsettled` results, sent since the last answer, were accepted; None where that can not be told.

        `count` came in at `at` and includes `accepted`, the result that it was the answer to.
        """
        begin = at - WINDOW_S
        counted = [span for span in self._counted if span.latest > begin - ANSWER_S]
        new = count - (accepted is not None)
        more = min(max(new - len(counted), 0), len(unsettled))  # at least so many were accepted
        if not self._heard and new > len(unsettled):
            more = 0  # some are from before we first heard of it
        self._heard = True
        most = new - sum(span.earliest > begin for span in counted)
        # A count that fell by more than its oldest results is that of a validator which forgot some.
        others = False if 0 <= most <= more else None
        counted += [*unsettled[:more], *([accepted] if accepted is not None else [])]
        self._counted = self._reconciled(counted, count, begin, at)
        return [True] * more + [others] * (len(unsettled) - more)

    @staticmethod
    def _reconciled(counted: list[Span], count: int, begin: float, at: float) -> list[Span]:
        """Takes out or puts in as many as the validator's count has fewer or more, as its own words are what counts."""
        counted.sort(key=lambda span: span.latest)
        surplus = len(counted) - max(count, 0)
        for span in [span for span in counted if span.earliest <= begin][: max(surplus, 0)]:
            counted.remove(span)
        # One that crashed forgot the newest.
        del counted[max(count, 0) :]
        # A stranger's number: of more than one a second nothing is kept.
        missing = min(max(count, 0), int(WINDOW_S)) - len(counted)
        return [Span(begin, at)] * max(missing, 0) + counted
