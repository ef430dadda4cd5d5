"""Workers: from an assignment to a result, by way of the generation service."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Protocol

from neurons import spz
from neurons.logging_setup import quoted
from neurons.miner.assignment import DEFAULT_PAUSE_S, Assignment
from neurons.miner.generator import Generated, GenerationFailed, ServiceUnavailable
from neurons.miner.submitter import Submitter
from neurons.miner.task_manager import AsyncTaskManager
from neurons.protocol import Task

log = logging.getLogger(__name__)


class Generator(Protocol):
    async def generate(self, task: Task) -> Generated: ...


async def work(
    manager: AsyncTaskManager, generator: Generator, submitter: Submitter, totals: Counter[str], busy: set[Assignment]
) -> None:
    """One worker: takes assignments until the manager is closed. `busy` holds what the workers have in hand."""
    while (assignment := await manager.next_assignment()) is not None:
        busy.add(assignment)
        try:
            submitter.submit(assignment, await _produce(assignment, generator, totals))
        except ServiceUnavailable as error:
            log.error("Generation failed for validator [%d]: %s; the task stays open", assignment.validator.uid, error)
            totals["unavailable"] += 1
            assignment.settle(time.time() + DEFAULT_PAUSE_S)
        finally:
            busy.discard(assignment)


async def _produce(assignment: Assignment, generator: Generator, totals: Counter[str]) -> bytes:
    """The compressed splat, or b"" where submitting one would be in vain. Raises ServiceUnavailable.

    An unacceptable result costs ten minutes of cooldown, an empty one costs none.
    """
    uid = assignment.validator.uid
    started = time.monotonic()
    try:
        generated = await generator.generate(assignment.task)
        if generated.score is not None:
            log.info("CLIP Score: %.2f (validator [%d], seed %s)", generated.score, uid, quoted(generated.seed))
        reason = _rejection(generated, assignment.threshold)
        if reason is not None:
            totals["rejected"] += 1
            log.warning("Validation failed for validator [%d]: %s; submitting nothing", uid, reason)
            return b""
        result = await asyncio.to_thread(spz.compress, generated.ply)
    except GenerationFailed as error:
        log.error("Generation failed for validator [%d]: %s", uid, error)
    except ServiceUnavailable:
        raise
    except Exception:
        # Whatever went wrong with this task must not take the worker along.
        log.exception("Generation failed for validator [%d]", uid)
    else:
        totals["generated"] += 1
        log.info("Generated for validator [%d]: %d bytes in %.1f s", uid, len(result), time.monotonic() - started)
        return result
    totals["failed"] += 1
    return b""


def _rejection(generated: Generated, threshold: float) -> str | None:
    if not generated.ply:
        return quoted(generated.rejected or "the service sent no splat")
    if generated.score is not None and generated.score < threshold:
        return f"score {generated.score:.2f} under the threshold {threshold:.2f}"
    return None
