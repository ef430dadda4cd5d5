"""What a validator of subnet 17 allows a miner to do, and when. No network in here: the clock is handed in.

As the public validator's code behaves; tests/golden/validator_rules.json has what it answers. Organic tasks and duels
are left out: with one miner there is nobody to share or to compare with, and to it their tasks look like any other.
"""

from __future__ import annotations

import base64
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, Field

from neurons.protocol import Feedback, ImageTask, Task, TextTask

# A miner's rating before its first duel, which it keeps here.
DUEL_RATING = 1500.0

# "repetition": feedback and nothing else; it says nothing about the result.
Outcome = Literal["accepted", "declined", "broken", "empty", "repetition"]


@dataclass(frozen=True)
class Limits:
    """The validators' defaults; times in seconds. `second` is what most moments are rounded down to."""

    task_cooldown: float = 300.0
    throttle_period: float = 30.0
    failure_penalty: float = 600.0
    validation_lock: float = 30.0
    violation_penalty: float = 10.0
    violations_allowed: int = 100
    unregistered_cooldown: float = 3600.0
    window: float = 4 * 3600.0
    validation_threshold: float = 0.6
    moving_average_alpha: float = 0.05
    state_interval: float = 600.0
    second: float = 1.0

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
            state_interval=self.state_interval / time_scale,
            second=self.second / time_scale,
        )


class MinerState(BaseModel):
    """What a validator knows of one miner, and keeps in its state file. Times are unix seconds."""

    task: TextTask | ImageTask | None = Field(default=None, discriminator="type")
    assigned_at: float | None = None
    cooldown_until: float = 0.0
    violations: int = 0
    locked_until: float = 0.0
    last_accepted_at: float = 0.0
    average_score: float = 1.0
    accepted: deque[float] = Field(default_factory=deque)  # times, oldest first


class _State(BaseModel):
    miners: dict[str, MinerState]


@dataclass(frozen=True)
class PullAnswer:
    """The fields of a PullTask's answer: what is not said of has the protocol's default."""

    task: Task | None = None
    validation_threshold: float = 0.6
    throttle_period: int = 0
    cooldown_until: int = 0
    violations: int = 0


@dataclass(frozen=True)
class Judgement:
    """The answer to a submission, and the validator's own view of it. `score` is None where nothing was scored."""

    outcome: Outcome
    reason: str
    score: float | None
    feedback: Feedback
    cooldown_until: int


class Rules:
    """One validator's bookkeeping: one assigned task per miner, cooldowns, violations, the four-hour window.

    `prompts` gives a text, or the bytes of a picture, for each task. Before `known_from` (unix seconds) the validator
    has not heard of these miners yet.
    """

    def __init__(
        self,
        limits: Limits,
        miners: Iterable[str],
        prompts: Iterator[str | bytes],
        clock: Callable[[], float] = time.time,
        known_from: float = 0.0,
    ) -> None:
        self.limits = limits
        self.clock = clock
        self.miners = {hotkey: MinerState() for hotkey in miners}
        self._prompts = prompts
        self._known_from = known_from

    def pull(self, hotkey: str) -> PullAnswer:
        """What a pull of this miner is answered: a task, or the cooldown that it has to wait for."""
        now = self.clock()
        limits = self.limits
        miner = self._find(hotkey)
        if miner is None:
            return PullAnswer(cooldown_until=math.ceil(self._rounded(now) + limits.unregistered_cooldown))
        if now < miner.cooldown_until:
            miner.violations += 1
            if miner.violations > limits.violations_allowed:
                miner.cooldown_until += limits.violation_penalty
            return PullAnswer(cooldown_until=math.ceil(miner.cooldown_until), violations=miner.violations)
        if miner.task is None:
            miner.task = _task(next(self._prompts))
            miner.assigned_at = now
        return PullAnswer(miner.task, limits.validation_threshold, math.ceil(limits.throttle_period))

    def reason_to_refuse(self, hotkey: str) -> str | None:
        """Why a submission of this miner is not even looked at; None when it is."""
        miner = self._find(hotkey)
        if miner is None:
            return "unknown hotkey"
        return "no task assigned" if miner.task is None else None

    def receive(self, hotkey: str, task_id: str, signed: Callable[[Task], bool], empty: bool) -> Judgement | Task:
        """What becomes of a submission before it is scored: an answer, or the task that it is to be scored for.

        `signed` is asked about the assigned task; what it raises leaves everything as it was. Nothing keeps a second
        submission of that task from being scored, too, once the lock has passed.
        """
        miner = self.miners[hotkey]
        now = self.clock()
        if miner.task is None or miner.task.id != task_id:
            return self._repetition(miner, "wrong id")
        if not signed(miner.task):
            self._end_task(miner, self.limits.failure_penalty)
            return self._judgement(miner, "declined", "the signature does not match")
        miner.violations = max(0, miner.violations - 1)
        if empty:
            self._end_task(miner)
            return self._judgement(miner, "empty")
        if miner.locked_until > now:
            return self._repetition(miner, "lock")
        miner.locked_until = self._rounded(now) + self.limits.validation_lock
        return miner.task

    def score(self, hotkey: str, score: float | None) -> Judgement:
        """What becomes of a submission when its score is there; None: the scoring service gave no answer.

        By then the task may have ended, and the next one begun, by another submission.
        """
        miner = self.miners[hotkey]
        limits = self.limits
        now = self.clock()
        if score is None:
            self._end_task(miner)
            return self._judgement(miner, "broken", "no answer of the scoring service")
        if miner.last_accepted_at + limits.task_cooldown - limits.throttle_period > now:
            return self._repetition(miner, "overlap", score)
        if score < limits.validation_threshold:
            self._end_task(miner, limits.failure_penalty)
            return self._judgement(miner, "declined", score=score)
        self._end_task(miner)
        score = min(1.0, score)
        miner.accepted.append(self._rounded(now))
        miner.average_score += limits.moving_average_alpha * (score - miner.average_score)
        miner.last_accepted_at = self._rounded(now)
        return self._judgement(miner, "accepted", score=score)

    def saved(self) -> str:
        """The state file's content."""
        return _State(miners=self.miners).model_dump_json()

    def restore(self, saved: str | None) -> None:
        """What a start with this state file, or without one, makes of the bookkeeping. Raises ValueError."""
        known = {} if saved is None else _State.model_validate_json(saved).miners
        self.miners = {hotkey: known.get(hotkey, MinerState()) for hotkey in self.miners}

    def _find(self, hotkey: str) -> MinerState | None:
        return self.miners.get(hotkey) if self.clock() >= self._known_from else None

    def _end_task(self, miner: MinerState, penalty: float = 0.0) -> None:
        limits = self.limits
        now = self.clock()
        cooldown = limits.task_cooldown + penalty
        if miner.assigned_at is None:  # ended before, by an overlapping submission
            until = self._rounded(now) + cooldown
        else:
            until = max(now + cooldown - limits.throttle_period, miner.assigned_at + cooldown)
        miner.cooldown_until = self._rounded(until)
        miner.task = None
        miner.assigned_at = None

    def _repetition(self, miner: MinerState, reason: str, score: float | None = None) -> Judgement:
        return self._judgement(miner, "repetition", reason, score)

    def _judgement(
        self, miner: MinerState, outcome: Outcome, reason: str = "", score: float | None = None
    ) -> Judgement:
        now = self._rounded(self.clock())
        while miner.accepted and miner.accepted[0] <= now - self.limits.window:
            miner.accepted.popleft()
        count = len(miner.accepted)
        feedback = Feedback(
            # As misleading as it is: a declined result has neither this nor a score.
            validation_failed=outcome == "broken",
            task_fidelity_score=score or 0.0 if outcome == "accepted" else 0.0,
            average_fidelity_score=miner.average_score,
            generations_within_the_window=count,
            current_duel_rating=DUEL_RATING,
            current_miner_reward=count * DUEL_RATING,
        )
        return Judgement(outcome, reason, score, feedback, math.ceil(miner.cooldown_until))

    def _rounded(self, moment: float) -> float:
        return math.floor(moment / self.limits.second) * self.limits.second


def _task(prompt: str | bytes) -> Task:
    task_id = str(uuid.uuid4())
    if isinstance(prompt, bytes):
        return ImageTask(id=task_id, prompt=base64.b64encode(prompt).decode())
    return TextTask(id=task_id, prompt=prompt)
