"""What a validator of subnet 17 allows a miner to do, and when. No network in here: the clock is handed in."""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from neurons.protocol import Feedback, TextTask

# A miner's rating before its first duel. A rehearsal has one miner, so there are no duels and this is what it keeps.
DUEL_RATING = 1500.0


@dataclass(frozen=True)
class Limits:
    """The validators' defaults; times in seconds."""

    task_cooldown: float = 300.0
    throttle_period: float = 30.0
    failure_penalty: float = 600.0
    validation_lock: float = 30.0
    violation_penalty: float = 10.0
    violations_allowed: int = 100
    unregistered_cooldown: float = 3600.0
    window: float = 4 * 3600.0
    validation_threshold: float = 0.6

    def compressed(self, time_scale: float) -> Limits:
        """The same rules with every time divided by `time_scale`."""
        return replace(
            self,
            task_cooldown=self.task_cooldown / time_scale,
            throttle_period=self.throttle_period / time_scale,
            failure_penalty=self.failure_penalty / time_scale,
            validation_lock=self.validation_lock / time_scale,
            violation_penalty=self.violation_penalty / time_scale,
            unregistered_cooldown=self.unregistered_cooldown / time_scale,
            window=self.window / time_scale,
        )


@dataclass
class MinerState:
    """What a validator knows of one miner. Times are unix seconds."""

    task: TextTask | None = None
    assigned_at: float = 0.0
    cooldown_until: float = 0.0
    violations: int = 0
    locked_until: float = 0.0
    validating: bool = False
    last_score: float = 0.0
    accepted: deque[tuple[float, float]] = field(default_factory=deque)  # (time, score), oldest first


@dataclass(frozen=True)
class PullAnswer:
    """`cooldown_until` is in whole unix seconds, never earlier than the moment that counts."""

    task: TextTask | None
    cooldown_until: int
    violations: int


class Rules:
    """One validator's bookkeeping: one assigned task per miner, cooldowns, violations, the four-hour window."""

    def __init__(
        self,
        limits: Limits,
        miners: Iterable[str],
        prompts: Iterator[str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits
        self.miners = {hotkey: MinerState() for hotkey in miners}
        self._prompts = prompts
        self._clock = clock

    def pull(self, hotkey: str) -> PullAnswer:
        now = self._clock()
        miner = self.miners.get(hotkey)
        if miner is None:
            return PullAnswer(None, math.ceil(now + self.limits.unregistered_cooldown), 0)
        if miner.task is not None:
            return PullAnswer(miner.task, 0, miner.violations)
        if now < miner.cooldown_until:
            miner.violations += 1
            if miner.violations > self.limits.violations_allowed:
                miner.cooldown_until += self.limits.violation_penalty
            return PullAnswer(None, math.ceil(miner.cooldown_until), miner.violations)
        miner.task = TextTask(id=str(uuid.uuid4()), prompt=next(self._prompts))
        miner.assigned_at = now
        return PullAnswer(miner.task, 0, miner.violations)

    def reason_to_refuse(self, hotkey: str) -> str | None:
        """Why a submission of this miner is not even looked at; None when it is."""
        miner = self.miners.get(hotkey)
        if miner is None:
            return "unknown hotkey"
        if miner.task is None and not self._is_locked(miner):
            return "no task assigned"
        return None

    def begin_validation(self, hotkey: str, task_id: str) -> TextTask | None:
        """Locks the miner's assigned task and returns it.

        None for a resubmission or another task's result, which get feedback and nothing else: no cooldown either.
        """
        miner = self.miners[hotkey]
        if self._is_locked(miner) or miner.task is None or miner.task.id != task_id:
            return None
        miner.validating = True
        miner.locked_until = self._clock() + self.limits.validation_lock
        return miner.task

    def abandon_validation(self, hotkey: str) -> None:
        """The validator could not score: the task stays with the miner, which may hand it in again."""
        miner = self.miners[hotkey]
        miner.validating = False
        miner.locked_until = 0.0

    def finish_validation(self, hotkey: str, score: float | None) -> bool:
        """Ends the assignment; whether the result is accepted. `score` is None for an empty result."""
        miner = self.miners[hotkey]
        now = self._clock()
        limits = self.limits
        accepted = score is not None and score >= limits.validation_threshold
        miner.cooldown_until = max(
            now + limits.task_cooldown - limits.throttle_period, miner.assigned_at + limits.task_cooldown
        )
        if accepted:
            miner.accepted.append((now, score or 0.0))
            miner.violations = max(0, miner.violations - 1)
        elif score is not None:
            miner.cooldown_until += limits.failure_penalty
        miner.last_score = score or 0.0
        miner.task = None
        miner.validating = False
        return accepted

    def feedback(self, hotkey: str, validation_failed: bool = False) -> Feedback:
        miner = self.miners[hotkey]
        while miner.accepted and miner.accepted[0][0] <= self._clock() - self.limits.window:
            miner.accepted.popleft()
        count = len(miner.accepted)
        return Feedback(
            validation_failed=validation_failed,
            task_fidelity_score=miner.last_score,
            average_fidelity_score=sum(score for _, score in miner.accepted) / count if count else 0.0,
            generations_within_the_window=count,
            current_duel_rating=DUEL_RATING,
            current_miner_reward=count * DUEL_RATING,
        )

    def cooldown_until(self, hotkey: str) -> int:
        return math.ceil(self.miners[hotkey].cooldown_until)

    def _is_locked(self, miner: MinerState) -> bool:
        return miner.validating or self._clock() < miner.locked_until
