"""Hands results to validators without making anyone wait, and not twice once one has answered."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Protocol, TypeVar

import bittensor as bt

from neurons.logging_setup import quoted
from neurons.miner.assignment import Assignment
from neurons.miner.clock import DEFAULT_PAUSE_S, ValidatorClocks
from neurons.miner.events import Recorder, Submission, SubmissionOutcome, answered_outcome
from neurons.miner.spool import MAX_AGE_S, Spool, SpooledResult
from neurons.miner.validators import ValidatorDirectory
from neurons.protocol import SUBMIT_TIMEOUT_S, SubmitResults, Task, make_submission

# After a submission without an answer: doubled with each one in a row.
FIRST_RETRY_S = 2.0
MAX_RETRY_S = 60.0
# The validators' default, of one that has not yet told of a cooldown.
TASK_COOLDOWN_S = 300.0

SynapseT = TypeVar("SynapseT", bound=bt.Synapse)

log = logging.getLogger(__name__)


class ValidatorCaller(Protocol):
    """The one method of bittensor's Dendrite that the miner uses. Errors come back as the synapse's status."""

    async def call(
        self, target_axon: bt.AxonInfo, synapse: SynapseT, timeout: float, deserialize: bool
    ) -> SynapseT: ...


class Submitter:
    """Owns the submissions under way."""

    def __init__(
        self,
        dendrite: ValidatorCaller,
        directory: ValidatorDirectory,
        clocks: ValidatorClocks,
        keypair: bt.Keypair,
        spool: Spool,
        record: Recorder,
    ) -> None:
        self._dendrite = dendrite
        self._directory = directory
        self._clocks = clocks
        self._now = clocks.now
        self._keypair = keypair
        self._spool = spool
        self._record = record
        self._under_way: set[asyncio.Task[None]] = set()
        self._last_waits: dict[str, float] = {}  # hotkey -> seconds of the latest cooldown
        self._unjudged: set[tuple[str, str]] = set()  # (hotkey, task id) of answered results that are kept

    def submit(self, assignment: Assignment, result: bytes) -> None:
        """Starts handing in `result` (`.spz`, or b"" for nothing) and returns at once."""
        delivery = asyncio.create_task(self._deliver(assignment, result))
        self._under_way.add(delivery)
        delivery.add_done_callback(self._finished)

    def pulled(self, hotkey: str, task: Task | None) -> None:
        """To be called with what a pull was answered: a result is not kept for a validator that does not ask for it."""
        for kept_for, task_id in list(self._unjudged):
            if kept_for == hotkey and (task is None or task.id != task_id):
                self._forget(hotkey, task_id)

    async def drain(self, timeout: float) -> None:
        """Waits for the submissions under way; after `timeout` seconds leaves them to the spool."""
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=timeout)
            for delivery in late:
                delivery.cancel()
            if late:
                log.warning("%d submissions not answered yet are left in the spool", len(late))
                await asyncio.wait(late)

    def _finished(self, delivery: asyncio.Task[None]) -> None:
        self._under_way.discard(delivery)
        if not delivery.cancelled() and (error := delivery.exception()) is not None:
            log.error("Submission failed", exc_info=error)

    async def _deliver(self, assignment: Assignment, result: bytes) -> None:
        """Spool, send until answered, forget. Whatever ends this before the last step leaves the result spooled."""
        uid, hotkey, task = assignment.validator.uid, assignment.validator.hotkey, assignment.task
        ask_again_at: float | None = None
        try:
            try:
                await asyncio.to_thread(self._spool.put, SpooledResult(hotkey, task, result))
            except OSError as error:
                log.error("Spool: %s; the result for validator [%d] is in memory alone", error, uid)
            started = self._now()
            response = await self._send(assignment, result)
            outcome, reason = self._judge(assignment, response, len(result))
            feedback = None
            if response is not None and response.is_success:
                feedback = response.feedback
            if response is not None and _is_for_a_repetition(response) and outcome != "failed":
                # Perhaps the validator broke while it judged: then it hands the task out again.
                self._unjudged.add((hotkey, task.id))
            else:
                self._forget(hotkey, task.id)
            ask_again_at = self._ask_again_at(hotkey, response)
            seconds = self._now() - started
            self._record(
                Submission(assignment.validator, task.id, outcome, seconds, len(result), feedback, ask_again_at, reason)
            )
        finally:
            assignment.settle(self._now() + DEFAULT_PAUSE_S if ask_again_at is None else ask_again_at)

    def _forget(self, hotkey: str, task_id: str) -> None:
        self._spool.remove(hotkey, task_id)
        self._unjudged.discard((hotkey, task_id))

    def _ask_again_at(self, hotkey: str, response: SubmitResults | None) -> float | None:
        """Our time from which the validator may be asked again; None where nothing is known of it."""
        if response is not None and response.is_success and response.cooldown_until > 0:
            ask_again_at = self._clocks.next_pull_at(hotkey, response.cooldown_until)
            self._last_waits[hotkey] = ask_again_at - self._now()
            return ask_again_at
        if (response is not None and response.is_success) or hotkey in self._last_waits:
            # Taken before, or refused for that, with an answer that was lost: then there is a cooldown.
            return self._now() + self._last_waits.get(hotkey, TASK_COOLDOWN_S) + DEFAULT_PAUSE_S
        return None

    async def _send(self, assignment: Assignment, result: bytes) -> SubmitResults | None:
        """The validator's answer, be it a refusal; None when there was none for as long as a task can matter."""
        delay = FIRST_RETRY_S
        started = self._now()
        while True:
            # Where it is now: it may have moved since the pull.
            validator = self._directory.eligible.get(assignment.validator.hotkey, assignment.validator)
            submission = make_submission(assignment.task, result, validator.hotkey, self._keypair)
            response = await self._dendrite.call(
                validator.axon_info(), submission, timeout=SUBMIT_TIMEOUT_S, deserialize=False
            )
            if _is_answer(response):
                return response
            pause = delay * random.uniform(0.5, 1.5)
            if self._now() + pause - started > MAX_AGE_S:
                return None
            log.warning(
                "Submission to validator [%d] failed: %s; next attempt in %.1f s",
                validator.uid,
                status_of(response),
                pause,
            )
            await asyncio.sleep(pause)
            delay = min(2 * delay, MAX_RETRY_S)

    def _judge(
        self, assignment: Assignment, response: SubmitResults | None, size: int
    ) -> tuple[SubmissionOutcome, str]:
        """What became of a submission, and why; says so in the log."""
        uid, task_id = assignment.validator.uid, quoted(assignment.task.id)
        if response is None:
            log.error("Submission to validator [%d] given up: no answer in %.0f s, %s", uid, MAX_AGE_S, task_id)
            return "given_up", "no answer"
        if not response.is_success and _status_code(response) != 200:
            log.error("Submission to validator [%d] refused: %s", uid, status_of(response))
            return "refused", status_of(response)
        log.info("Task submitted to validator [%d]: %s, %d bytes", uid, task_id, size)
        if not response.is_success:
            log.warning("Validator [%d] took %s, and its answer is not readable: %s", uid, task_id, status_of(response))
            return answered_outcome(size, None), status_of(response)
        feedback = response.feedback
        repetition = _is_for_a_repetition(response)
        if repetition:
            log.warning("Validator [%d] had %s before, and does not say what became of it", uid, task_id)
        if feedback is None:
            return answered_outcome(size, None), ""
        log.info(
            "Feedback from [%d]: Score=%.2f, Reward=%.2f (average %.2f, %d accepted in the window, rating %.0f)",
            uid,
            feedback.task_fidelity_score,
            feedback.current_miner_reward,
            feedback.average_fidelity_score,
            feedback.generations_within_the_window,
            feedback.current_duel_rating,
        )
        if feedback.validation_failed:
            log.warning("Validation failed: validator [%d] did not accept %s", uid, task_id)
        return answered_outcome(size, feedback, judged=not repetition), ""


def _is_answer(response: bt.Synapse) -> bool:
    """Whether the validator has the result (200, readable or not), or its axon said a no that it would say again."""
    return response.is_success or _status_code(response) in (200, 400, 403, 404)


def _is_for_a_repetition(response: SubmitResults) -> bool:
    """A result that the validator has already gets feedback and no cooldown, be it judged or still being judged."""
    return response.is_success and response.cooldown_until <= 0


def _status_code(response: bt.Synapse) -> int | None:
    return None if response.axon is None else response.axon.status_code


def status_of(response: bt.Synapse) -> str:
    terminal = response.dendrite
    return "no answer" if terminal is None else f"{terminal.status_code} {quoted(terminal.status_message)}"
