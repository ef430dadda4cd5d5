"""Workers: turn assignments into results with the generation services."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from common import spz
from common.log_lines import quoted, score_in_words
from neurons.chain import Neuron
from neurons.miner.assignment import USEFUL_AGE_S, Assignment
from neurons.miner.generation.pool import ServiceUnavailable
from neurons.miner.generation.service import AttemptFailed, Generated, GenerationFailed
from neurons.miner.records.events import Generation, Recorder
from neurons.miner.submission.submitter import Submitter
from neurons.miner.tasks.admission import PLANNED_AGE_S
from neurons.miner.tasks.best_of import BestOf, Round
from neurons.miner.tasks.task_manager import AsyncTaskManager
from neurons.miner.validators.clock import DEFAULT_PAUSE_S, steady_time
from neurons.protocol import Task

SEED_BITS = 32

log = logging.getLogger(__name__)


class TaskLeft(Exception):
    """The task is left without a submission. It stays open, and its validator gives it out again."""


class Generator(Protocol):
    """What a worker needs of a GeneratorPool."""

    async def generate(
        self, task: Task, seed: int, patience: float, candidates: int, budget: float | None
    ) -> Generated:
        """The best of `candidates` that are made within `budget` seconds; given up after `patience` seconds. Raises
        GenerationFailed, AttemptFailed or ServiceUnavailable.
        """


class Worker:
    """Works on assignments until the manager is closed. `retries`: how many further seeds are tried for a rejected
    result after the free time is over.
    """

    def __init__(
        self,
        manager: AsyncTaskManager,
        generator: Generator,
        submitter: Submitter,
        record: Recorder,
        *,
        best_of: BestOf,
        retries: int,
        now: Callable[[], float] = steady_time,
    ) -> None:
        self._manager = manager
        self._generator = generator
        self._submitter = submitter
        self._record = record
        self._best_of = best_of
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
                self._best_of.submitted(assignment)
                self._submitter.submit(assignment, result)

    async def _produce(self, assignment: Assignment) -> bytes:
        """The compressed splat, or b"" if none would be accepted. Raises TaskLeft.

        A declined result costs ten minutes of cooldown, an empty one none. While no candidate passes, more follow as
        long as that is free, and then up to `retries` more attempts.
        """
        made = retried = 0
        planned = self._plan(assignment, made)
        while True:
            started = self._now()
            result, event = await self._attempt(assignment, planned)
            made += event.candidates
            uid = assignment.validator.uid
            if event.outcome == "generated":
                result, event = await self._better(assignment, result, event, made)
                self._record(event)
                of = f", the best of {event.candidates}" if event.candidates > 1 else ""
                log.info("Generated for validator [%d]: %d bytes in %.1f s%s", uid, event.size, event.seconds, of)
                return result
            self._record(event)
            planned = self._plan(assignment, made)
            now = self._now()
            in_time = now - assignment.pulled_at + (now - started) <= PLANNED_AGE_S  # if the next one takes as long
            again = event.outcome != "given_up" and (planned is not None or (retried < self._retries and in_time))
            retried += planned is None
            stopping = again and self._manager.closing.is_set()
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
                return b""

    async def _better(
        self, assignment: Assignment, result: bytes, event: Generation, made: int
    ) -> tuple[bytes, Generation]:
        """A result that passes, or a better one among the candidates that can be made in the free time."""
        while event.score is not None and not self._manager.closing.is_set():
            planned = self._plan(assignment, made)
            if planned is None:
                break
            asked_at = self._now()
            found = await self._round(assignment, planned, event.score)
            if found is None:  # submit the best so far
                event = replace(event, seconds=event.seconds + self._now() - asked_at)
                break
            other, again = found
            if again.outcome not in ("generated", "rejected"):
                self._record(again)
                break
            made += again.candidates
            seconds, candidates = event.seconds + again.seconds, event.candidates + again.candidates
            if other:
                result, event = other, replace(again, first_score=event.first_score)
            event = replace(event, seconds=seconds, candidates=candidates)
        return result, event

    async def _round(self, assignment: Assignment, planned: Round, beat: float) -> tuple[bytes, Generation] | None:
        """As `_attempt`; None if it is late, if the services are gone, or as soon as the miner stops."""
        attempt = asyncio.create_task(self._attempt(assignment, planned, beat))
        closing = asyncio.create_task(self._manager.closing.wait())
        try:
            await asyncio.wait((attempt, closing), timeout=planned.seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            attempt.cancel()
            closing.cancel()
            await asyncio.gather(attempt, closing, return_exceptions=True)
        try:
            return attempt.result()
        except (asyncio.CancelledError, TaskLeft):
            return None

    def _plan(self, assignment: Assignment, made: int) -> Round | None:
        return self._best_of.round(assignment, made, self._manager.in_generation)

    async def _attempt(
        self, assignment: Assignment, planned: Round | None, beat: float | None = None
    ) -> tuple[bytes, Generation]:
        """One request for candidates, and its event: "given_up" if another attempt would end the same way.

        The result is b"" also if its score does not exceed `beat`, another result's.
        """
        validator, task = assignment.validator, assignment.task
        event = Generation(validator, task, "failed", seconds=0.0)
        try:
            patience = assignment.pulled_at + USEFUL_AGE_S - self._now()
            asked = (1, None) if planned is None else (planned.candidates, planned.budget)
            generated = await self._generator.generate(task, secrets.randbits(SEED_BITS), patience, *asked)
            event = replace(
                event,
                seconds=generated.seconds,
                score=generated.score,
                endpoint=generated.endpoint,
                candidates=generated.candidates,
                first_score=generated.first_score,
            )
            _log_score(validator, generated)
            reason = _rejection(generated, assignment.threshold)
            if reason is not None:
                return b"", replace(event, outcome="rejected", reason=reason)
            if beat is not None and (generated.score is None or generated.score <= beat):
                return b"", replace(event, outcome="generated")
            result = await asyncio.to_thread(spz.compress, generated.ply)
            return result, replace(event, outcome="generated", size=len(result))
        except GenerationFailed as error:
            return b"", replace(event, outcome="given_up", reason=str(error))
        except AttemptFailed as error:
            return b"", replace(event, reason=str(error), seconds=error.seconds, endpoint=error.endpoint)
        except ServiceUnavailable as error:
            self._record(replace(event, outcome="endpoint", reason=str(error)))
            raise TaskLeft(str(error)) from error
        except Exception as error:
            # An error with this task must not end the worker.
            log.exception("Generation failed for validator [%d]", validator.uid)
            return b"", replace(event, reason=type(error).__name__)


def _log_score(validator: Neuron, generated: Generated) -> None:
    if generated.score is None:
        return
    alignment = generated.parts.get("alignment", generated.score)
    log.info("CLIP Score: %.2f (validator [%d], seed %s)", alignment, validator.uid, quoted(generated.seed))
    if generated.parts:
        log.info("Score: %s", score_in_words(generated.score, generated.parts))


def _rejection(generated: Generated, threshold: float) -> str | None:
    if not generated.ply:
        return quoted(generated.rejected or "the service sent no splat")
    if generated.score is not None and generated.score < threshold:
        return f"score {generated.score:.2f} under the threshold {threshold:.2f}"
    return None
