"""What one validator's answers tell of the outcomes of results, also of those whose own answers were lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neurons.miner.records.events import SubmissionOutcome
from neurons.miner.records.verdicts import (
    ANSWER_S,
    TASK_COOLDOWN_S,
    PastSubmission,
    Span,
    Window,
    is_penalty,
    judge,
)
from neurons.miner.validators.clock import MIN_PAUSE_S
from neurons.protocol import Feedback


@dataclass(frozen=True)
class Settled:
    """The outcome of an earlier result. It stays "unknown" where no later answer can tell more."""

    task_id: str
    outcome: SubmissionOutcome


@dataclass(frozen=True)
class _Unsettled:
    """A result whose outcome only the validator's next count tells. `otherwise`: its outcome if that has not grown."""

    task_id: str
    span: Span
    otherwise: SubmissionOutcome


class Outcomes:
    """Follows one validator's counts and cooldowns. All times are in seconds, moments in unix seconds by our clock."""

    def __init__(self) -> None:
        self.last_cooldown_until = 0
        self._usual_cooldown = TASK_COOLDOWN_S
        self._window = Window()
        self._unsettled: list[_Unsettled] = []

    def remember(self, past: PastSubmission) -> None:
        """Takes in a submission of an earlier run. To be called before all else, with the oldest first."""
        span = Span(past.at - past.seconds - ANSWER_S, past.at)
        accepted = span if past.outcome == "accepted" else None
        if past.accepted_in_window is not None:
            unsettled = [each.span for each in self._unsettled]
            self._window.answered(past.at, past.accepted_in_window, accepted, unsettled)
            self._unsettled = []
            if past.cooldown and past.score:
                self._usual_cooldown = past.cooldown
        elif accepted is not None:
            self._window.add(accepted)
        if past.outcome == "unknown":
            otherwise: SubmissionOutcome = "unknown"
            if past.cooldown is not None:
                otherwise = "declined" if is_penalty(past.cooldown, 0.0, self._usual_cooldown) else "broken"
            self._unsettled.append(_Unsettled(past.task_id, span, otherwise))

    def answered(
        self, task_id: str, size: int, feedback: Feedback, until: int, ahead: float, span: Span, may_have_arrived: bool
    ) -> tuple[SubmissionOutcome | None, list[Settled]]:
        """What an answer tells of its own result, and of earlier ones; None where it is a repetition.

        `size`: bytes of the result. `until`: the answer's cooldown_until, which is `ahead` seconds from now. `span`: in
        which the result was judged; it ends now. `may_have_arrived`: an earlier copy may have been judged already.
        """
        outcome = judge(size, feedback, ends_task=ahead > 0 and until != self.last_cooldown_until)
        if outcome in ("accepted", "broken"):
            # Any other answer may have the rest of the cooldown that an earlier copy brought.
            self._usual_cooldown = max(ahead, MIN_PAUSE_S)
        self.last_cooldown_until = until or self.last_cooldown_until
        # Then an earlier copy may have been accepted, or may still be in progress.
        repeated = may_have_arrived and outcome in ("declined", "broken")
        found = self._window.answered(
            span.latest,
            feedback.generations_within_the_window,
            span if outcome == "accepted" else None,
            [*(each.span for each in self._unsettled), *([span] if repeated else [])],
        )
        otherwise: SubmissionOutcome = outcome or "unknown"
        if repeated:
            if otherwise == "declined" and not is_penalty(ahead, 0.0, self._usual_cooldown):
                otherwise = "broken"
            outcome = "accepted" if found.pop() else "unknown"
        settled = self._settle(found)
        if outcome == "unknown":
            self._unsettled.append(_Unsettled(task_id, span, otherwise))
        return outcome, settled

    def is_penalty(self, ahead: float, elapsed: float) -> bool | None:
        """Whether a cooldown that ends in `ahead` seconds is that of a result declined at most `elapsed` seconds ago.

        None where that can not be told.
        """
        return is_penalty(ahead, elapsed, self._usual_cooldown)

    def lost(self, task_id: str, span: Span, otherwise: SubmissionOutcome) -> None:
        """The next count tells whether this result was accepted. `otherwise`: its outcome if it was not."""
        self._unsettled.append(_Unsettled(task_id, span, otherwise))

    def _settle(self, accepted: Sequence[bool | None]) -> list[Settled]:
        """Settles all unsettled results by an answer's count. No later answer can tell more."""
        settled = []
        for each, is_accepted in zip(self._unsettled, accepted, strict=True):
            outcome = each.otherwise
            if is_accepted:
                outcome = "accepted"
            elif is_accepted is None and outcome == "broken":
                outcome = "unknown"
            settled.append(Settled(each.task_id, outcome))
        self._unsettled = []
        return settled
