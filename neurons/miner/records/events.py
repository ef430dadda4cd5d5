"""What happens in the miner, as facts: for the ledger, for the metrics, for whoever wants to know.

The parts of the miner call `record(event)` and go on. Nothing in here waits, and nothing in here fails. What validators
sent may be anything that its type allows: those who keep events bound and escape it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from neurons.chain import Neuron
from neurons.protocol import Feedback, Task

# task: a new one, or one given out again. cooldown: asked too early. refused: no task, no cooldown. failed: no answer.
PullOutcome = Literal["task", "cooldown", "refused", "failed"]
# generated: goes out. rejected: the self-check said no. failed: no splat. endpoint: the service was at fault, the task
# moves on. given_up: out of time or stopping before there was a result.
GenerationOutcome = Literal["generated", "rejected", "failed", "endpoint", "given_up"]
# accepted, declined: by the validator. broken: its scoring service gave no answer. empty: nothing was in it. refused:
# by the axon, for good. given_up: it never got through. unknown: the answer was lost, and it is not asked for any more.
SubmissionOutcome = Literal["accepted", "declined", "broken", "empty", "refused", "given_up", "unknown"]


@dataclass(frozen=True)
class Pull:
    """One pull, when its answer or its failure is in.

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
    """One attempt at one task, when it is over. A task of which two attempts are rejected makes three events.

    `candidates`: of how many it is the best, `first_score`: of the first. Candidates of several requests that led to
    one result are one attempt, and `seconds` their sum.

    `seconds`: for how long the endpoint had the task, 0 where none had it. `score`: by the self-check, as the
    validators score. `size`: bytes of the packed result. `endpoint`: address of the service.
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
    """One result's way to its validator, when it is over: one event a result, however often it was sent.

    `seconds`: from the first attempt to the answer that told. `size`: bytes of the packed result.
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
    """What became of a result that was recorded as unknown. It may stay unknown."""

    validator: Neuron
    task_id: str
    outcome: SubmissionOutcome


Event = Pull | Generation | Submission | Settlement
Recorder = Callable[[Event], None]
