"""Events of the miner, for the ledger and the metrics.

The miner's parts call `record(event)`, which neither waits nor fails. Values from validators are not checked beyond
their types: whoever stores events has to bound and escape them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from neurons.chain import Neuron
from neurons.protocol import Feedback, Task

# task: a new one, or the same again. cooldown: asked too early. refused: neither task nor cooldown. failed: no answer.
PullOutcome = Literal["task", "cooldown", "refused", "failed"]
# generated: to be submitted. rejected: by the self-check. failed: no splat. endpoint: the service failed, and the task
# goes to another one. given_up: no result before the time was over or the miner stopped.
GenerationOutcome = Literal["generated", "rejected", "failed", "endpoint", "given_up"]
# accepted, declined: by the validator. broken: its scoring service did not answer. empty: an empty result. refused: by
# the axon, finally. given_up: it never got through. unknown: the answer was lost, and the task is over.
SubmissionOutcome = Literal["accepted", "declined", "broken", "empty", "refused", "given_up", "unknown"]


@dataclass(frozen=True)
class Pull:
    """One finished pull.

    `seconds`: from request to answer. `ask_again_at`: unix seconds by our clock, where the answer set a time.
    `violations`: the validator's count of pulls that were too early, where it answered.
    """

    validator: Neuron
    outcome: PullOutcome
    seconds: float
    task_id: str = ""
    ask_again_at: float | None = None
    violations: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Generation:
    """One finished attempt at a task. A task with two rejected attempts before the last one makes three events.

    `candidates`: the number of which this is the best; `first_score`: the first one's score. Candidates of several
    requests for one result are one attempt, and `seconds` is their sum.

    `seconds`: how long endpoints had the task, 0 if none had it. `score`: final score of the self-check. `size`: bytes
    of the packed result. `endpoint`: address of the service.
    """

    validator: Neuron
    task: Task
    outcome: GenerationOutcome
    seconds: float
    score: float | None = None
    size: int = 0
    endpoint: str = ""
    reason: str = ""
    candidates: int = 1
    first_score: float | None = None


@dataclass(frozen=True)
class Submission:
    """One finished submission: one event per result, however often it was sent.

    `seconds`: from the first attempt to the answer that told the outcome. `size`: bytes of the packed result.
    """

    validator: Neuron
    task_id: str
    outcome: SubmissionOutcome
    seconds: float
    size: int = 0
    feedback: Feedback | None = None
    ask_again_at: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Settlement:
    """The outcome of a result that was recorded as unknown. It may stay unknown."""

    validator: Neuron
    task_id: str
    outcome: SubmissionOutcome


Event = Pull | Generation | Submission | Settlement
Recorder = Callable[[Event], None]
