"""Hands results to validators without making anyone wait, and not twice once one has answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from typing import Protocol, TypeVar

import bittensor as bt

from neurons.logging_setup import quoted
from neurons.miner.assignment import DEFAULT_PAUSE_S, Assignment, next_pull_at
from neurons.miner.spool import Spool, SpooledResult
from neurons.protocol import SUBMIT_TIMEOUT_S, SubmitResults, make_submission

RETRY_DELAYS_S = (2.0, 8.0, 30.0)

SynapseT = TypeVar("SynapseT", bound=bt.Synapse)

log = logging.getLogger(__name__)


class ValidatorCaller(Protocol):
    """The one method of bittensor's Dendrite that the miner uses. Errors come back as the synapse's status."""

    async def call(
        self, target_axon: bt.AxonInfo, synapse: SynapseT, timeout: float, deserialize: bool
    ) -> SynapseT: ...


class Submitter:
    """Owns the submissions under way."""

    def __init__(self, dendrite: ValidatorCaller, keypair: bt.Keypair, spool: Spool, totals: Counter[str]) -> None:
        self._dendrite = dendrite
        self._keypair = keypair
        self._spool = spool
        self._totals = totals
        self._under_way: set[asyncio.Task[None]] = set()

    def submit(self, assignment: Assignment, result: bytes) -> None:
        """Starts handing in `result` (`.spz`, or b"" for nothing) and returns at once."""
        delivery = asyncio.create_task(self._deliver(assignment, result))
        self._under_way.add(delivery)
        delivery.add_done_callback(self._finished)

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
        uid, hotkey, task = assignment.validator.uid, assignment.validator.hotkey, assignment.task
        ask_again_at = time.time() + DEFAULT_PAUSE_S
        try:
            try:
                await asyncio.to_thread(self._spool.put, SpooledResult(hotkey, task, result))
            except OSError as error:
                log.error("Spool: %s; the result for validator [%d] is in memory alone", error, uid)
            response = await self._send(assignment, result)
            if response is None:
                log.error("Submission to validator [%d] given up for now; the result stays in the spool", uid)
                return
            self._spool.remove(hotkey, task.id)
            if response.is_success:
                self._report(assignment, response, len(result))
                ask_again_at = next_pull_at(response.cooldown_until)
            else:
                self._totals["refused"] += 1
                log.error("Submission to validator [%d] refused: %s", uid, _status(response))
        finally:
            assignment.settle(ask_again_at)

    async def _send(self, assignment: Assignment, result: bytes) -> SubmitResults | None:
        """The validator's answer, be it a refusal; None when there was none after all attempts."""
        validator = assignment.validator
        for delay in (*RETRY_DELAYS_S, None):
            submission = make_submission(assignment.task, result, validator.hotkey, self._keypair)
            response = await self._dendrite.call(
                validator.axon_info(), submission, timeout=SUBMIT_TIMEOUT_S, deserialize=False
            )
            if response.is_success or _refused(response):
                return response
            log.warning("Submission to validator [%d] failed: %s", validator.uid, _status(response))
            if delay is not None:
                await asyncio.sleep(delay)
        return None

    def _report(self, assignment: Assignment, response: SubmitResults, size: int) -> None:
        uid = assignment.validator.uid
        self._totals["submitted"] += 1
        log.info("Task submitted to validator [%d]: %s, %d bytes", uid, quoted(assignment.task.id), size)
        feedback = response.feedback
        if feedback is None:
            return
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
            self._totals["failed_validation"] += 1
            log.warning("Validation failed: validator [%d] did not accept %s", uid, quoted(assignment.task.id))
        elif size:
            self._totals["accepted"] += 1


def _refused(response: bt.Synapse) -> bool:
    """Whether the axon itself said no, as opposed to errors on the way, which Dendrite also gives 4xx codes."""
    return response.axon is not None and response.axon.status_code in (400, 401, 403, 404)


def _status(response: bt.Synapse) -> str:
    terminal = response.dendrite
    return "no answer" if terminal is None else f"{terminal.status_code} {quoted(terminal.status_message)}"
