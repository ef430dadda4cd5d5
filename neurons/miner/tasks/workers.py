"""Workers: from an assignment to a result, by way of the generation services."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Protocol

from common import spz
from common.log_lines import quoted
from neurons.miner.assignment import USEFUL_AGE_S, Assignment
from neurons.miner.generation.pool import ServiceUnavailable
from neurons.miner.generation.service import AttemptFailed, Generated, GenerationFailed
from neurons.miner.records.events import Generation, GenerationOutcome, Recorder
from neurons.miner.submission.submitter import Submitter
from neurons.miner.tasks.admission import PLANNED_AGE_S
from neurons.miner.tasks.task_manager import AsyncTaskManager
from neurons.miner.validators.clock import DEFAULT_PAUSE_S, steady_time
from neurons.protocol import Task

SEED_BITS = 32

log = logging.getLogger(__name__)


class TaskLeft(Exception):
    """Nothing is submitted. The task stays open, and its validator hands it out again."""


class Generator(Protocol):
    """What a worker needs of a GeneratorPool."""

    async def generate(self, task: Task, seed: int, patience: float) -> Generated:
        """A splat within `patience` seconds. Raises GenerationFailed, AttemptFailed or ServiceUnavailable."""


class Worker:
    """Takes assignments until the manager is closed. A rejected result is tried again up to `retries` times."""

    def __init__(
        self,
        manager: AsyncTaskManager,
        generator: Generator,
        submitter: Submitter,
        record: Recorder,
        *,
        retries: int,
        now: Callable[[], float] = steady_time,
    ) -> None:
        self._manager = manager
        self._generator = generator
        self._submitter = submitter
        self._record = record
        self._retries = retries
        self._now = now

    async def run(self) -> None:
        """Works until the manager is closed."""
        while (assignment := await self._manager.next_assignment()) is not None:
            result = None
            try:
                result = await self._produce(assignment)
            except TaskLeft as error:
                uid = assignment.validator.uid
                log.error("Generation failed for validator [%d]: %s; the task stays open", uid, error)
            finally:
                self._manager.finished(assignment)
                if result is None:
                    assignment.settle(self._now() + DEFAULT_PAUSE_S)
            if result is not None:
                self._submitter.submit(assignment, result)

    async def _produce(self, assignment: Assignment) -> bytes:
        """The compressed splat, or b"" where none would be accepted. Raises TaskLeft.

        A declined result costs ten minutes of cooldown, an empty one none.
        """
        for attempt in range(self._retries + 1):
            started = self._now()
            result, event = await self._attempt(assignment)
            self._record(event)
            uid = assignment.validator.uid
            if event.outcome == "generated":
                log.info("Generated for validator [%d]: %d bytes in %.1f s", uid, event.size, event.seconds)
                return result
            in_time = 2 * self._now() - started - assignment.pulled_at <= PLANNED_AGE_S
            again = event.outcome != "given_up" and attempt < self._retries and in_time
            stopping = again and self._manager.closed
            log.warning(
                "%s for validator [%d]: %s; %s",
                "Validation failed" if event.outcome == "rejected" else "Generation failed",
                uid,
                event.reason,
                "stopping" if stopping else "trying another seed" if again else "submitting nothing",
            )
            if stopping:
                raise TaskLeft("the miner stops")
            if not again:
                break
        return b""

    async def _attempt(self, assignment: Assignment) -> tuple[bytes, Generation]:
        """One generation, and what became of it: "given_up" when another attempt would end the same way."""
        validator, task = assignment.validator, assignment.task

        def over(outcome: GenerationOutcome, reason: str = "", size: int = 0) -> Generation:
            score = None if generated is None else generated.score
            seconds, endpoint = (0.0, "") if done is None else (done.seconds, done.endpoint)
            return Generation(validator, task, outcome, seconds, score, size, endpoint, reason)

        generated: Generated | None = None
        done: Generated | AttemptFailed | None = None  # by a service, which says how long it took
        try:
            patience = assignment.pulled_at + USEFUL_AGE_S - self._now()
            done = generated = await self._generator.generate(task, secrets.randbits(SEED_BITS), patience)
            if generated.score is not None:
                seed = quoted(generated.seed)
                alignment = generated.parts.get("alignment", generated.score)
                log.info("CLIP Score: %.2f (validator [%d], seed %s)", alignment, validator.uid, seed)
                if generated.parts:
                    parts = ", ".join(f"{part} {value:.2f}" for part, value in generated.parts.items())
                    log.info("Score: %.2f (%s)", generated.score, parts)
            reason = _rejection(generated, assignment.threshold)
            if reason is not None:
                return b"", over("rejected", reason)
            result = await asyncio.to_thread(spz.compress, generated.ply)
            return result, over("generated", size=len(result))
        except GenerationFailed as error:
            return b"", over("given_up", str(error))
        except AttemptFailed as error:
            done = error
            return b"", over("failed", str(error))
        except ServiceUnavailable as error:
            self._record(over("endpoint", str(error)))
            raise TaskLeft(str(error)) from error
        except Exception as error:
            # Whatever went wrong with this task must not take the worker along.
            log.exception("Generation failed for validator [%d]", validator.uid)
            return b"", over("failed", type(error).__name__)


def _rejection(generated: Generated, threshold: float) -> str | None:
    if not generated.ply:
        return quoted(generated.rejected or "the service sent no splat")
    if generated.score is not None and generated.score < threshold:
        return f"score {generated.score:.2f} under the threshold {threshold:.2f}"
    return None
