"""Submits results in the background, and keeps each until its outcome is known.

A result is sent again while its validator cannot be reached. After a lost answer it is sent again only as long as the
validator's lock keeps it from being scored twice. Later, the next pull decides: if it names the task, the result is
sent again; if not, the task is over. A result that cannot be delivered is given up, and its task is ended with an empty
result, because the validator gives out no other task before.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import bittensor as bt
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, wait_exponential

from common.log_lines import quoted
from neurons.chain import Neuron
from neurons.miner.assignment import Assignment
from neurons.miner.records.events import Recorder, Settlement, Submission, SubmissionOutcome
from neurons.miner.records.verdicts import ANSWER_S, LOCK_S, PastSubmission, Span
from neurons.miner.submission.outcomes import Outcomes
from neurons.miner.submission.spool import Spool, SpooledResult
from neurons.miner.validators.clock import DEFAULT_PAUSE_S, ValidatorClocks
from neurons.miner.validators.dendrite import NO_CONNECTION
from neurons.miner.validators.directory import ValidatorDirectory
from neurons.protocol import SUBMIT_TIMEOUT_S, Feedback, PullTask, SubmitResults, Task, make_submission

# Seconds after a submission that did not get through. Doubled with each one in a row.
FIRST_RETRY_S = 2.0
MAX_RETRY_S = 60.0
# Seconds for which a result is sent again before a pull has to confirm that it is still wanted.
RETRY_FOR_S = 300.0
# Within this time (the validator's lock of 30 s, less 5 s for the upload) a repetition is not scored twice.
UNDER_LOCK_S = LOCK_S - 5.0
# How many pulls may ask for a result that the validator then refuses.
MAX_ROUNDS = 12
# Seconds before the pull that tells a task's outcome. This and LOCK_S are doubled with each result in a row whose
# outcome a validator does not tell, since each costs a generation.
SOON_S = 2.0
MAX_PAUSE_S = 300.0
# Statuses after which another attempt may succeed: not authorised (a nonce), too slow, too early, too many.
PASSING_STATUSES = (401, 408, 425, 429)

SynapseT = TypeVar("SynapseT", bound=bt.Synapse)

log = logging.getLogger(__name__)


class ValidatorCaller(Protocol):
    """The one method of bittensor's Dendrite that the miner uses. Errors come back as the synapse's status."""

    async def call(
        self,
        target_axon: bt.AxonInfo,
        synapse: SynapseT,
        timeout: float,  # noqa: ASYNC109 - bittensor's name
        deserialize: bool,
    ) -> SynapseT:
        """`synapse`, with the answer in it. `timeout` in seconds. Never raises for what a validator does."""


@dataclass
class _Kept:
    """A result whose outcome is not known yet."""

    size: int | None  # None: in the spool since an earlier run, not read yet
    first_sent: float
    still_open_at: float  # when its validator was last known to wait for it
    in_memory: SpooledResult | None = None  # the result, if it could not be spooled
    may_have_arrived: bool = False  # an answer was lost, so the validator may have it
    rounds: int = 0
    seconds_tried: float = 0.0
    reason: str = "no answer"
    refused: bool = False
    given_up: SubmissionOutcome | None = None  # set when its task is to be ended with an empty result
    ask_again_at: float | None = None  # from the answer that ended its task
    recorded: bool = False


class Submitter:
    """Owns the running submissions and the kept results."""

    def __init__(
        self,
        dendrite: ValidatorCaller,
        directory: ValidatorDirectory,
        clocks: ValidatorClocks,
        keypair: bt.Keypair,
        spool: Spool,
        record: Recorder,
        history: Iterable[PastSubmission] = (),
    ) -> None:
        """`history`: what an earlier run recorded in the last WINDOW_S, oldest first."""
        self._dendrite = dendrite
        self._directory = directory
        self._clocks = clocks
        self._now = clocks.now
        self._keypair = keypair
        self._spool = spool
        self._record = record
        self._under_way: set[asyncio.Task[None]] = set()
        self._outcomes: defaultdict[str, Outcomes] = defaultdict(Outcomes)
        self._untold: Counter[str] = Counter()  # hotkey -> number of results in a row without an outcome
        self._kept: dict[tuple[str, str], _Kept] = {}
        for hotkey, task_id in spool.entries():
            written_at = self._now() - spool.age(hotkey, task_id)
            # It is not known whether an earlier run sent it.
            self._kept[hotkey, task_id] = _Kept(None, written_at, written_at, may_have_arrived=True)
        for past in history:
            self._outcomes[past.hotkey].remember(past)

    def submit(self, assignment: Assignment, result: bytes, kept: bool = False) -> None:
        """Starts submitting `result` (`.spz`, or b"" for nothing), and returns at once.

        `kept`: it came from `kept_result`. Settles `assignment` when it is known when to ask its validator again.
        """
        delivery = asyncio.create_task(self._deliver(assignment, result, kept))
        self._under_way.add(delivery)
        delivery.add_done_callback(self._finished)

    def keeps_for(self, hotkey: str) -> bool:
        """Whether there is a result whose outcome the validator's next pull decides."""
        return any(kept_for == hotkey for kept_for, _ in self._kept)

    async def kept_result(self, validator: Neuron, task: Task) -> bytes | None:
        """The kept result for exactly this task; None if there is none."""
        kept = self._kept.get((validator.hotkey, task.id))
        if kept is None:
            return None
        entry = kept.in_memory or await asyncio.to_thread(self._spool.get, validator.hotkey, task)
        if entry is None or entry.task != task:
            # Too old, or for another task of this name.
            self._conclude(validator, task.id, kept, "given_up")
            self._forget(validator.hotkey, task.id)
            return None
        return entry.result

    def pulled(self, validator: Neuron, answer: PullTask) -> None:
        """To be called with the answer to each pull. Drops the result that it does not ask for."""
        hotkey = validator.hotkey
        if answer.cooldown_until > 0:
            self._outcomes[hotkey].last_cooldown_until = answer.cooldown_until
        if answer.task is None and answer.cooldown_until <= 0:
            return  # refused without a reason, which tells nothing about the task
        for kept_for, task_id in list(self._kept):
            if kept_for == hotkey and (answer.task is None or answer.task.id != task_id):
                self._drop(validator, task_id, answer)

    async def drain(self, seconds: float) -> None:
        """Waits for running submissions, at most `seconds`; leaves the rest in the spool."""
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=seconds)
            for delivery in late:
                delivery.cancel()
            if late:
                log.warning("%d submissions not answered yet are left in the spool", len(late))
                await asyncio.wait(late)

    def _finished(self, delivery: asyncio.Task[None]) -> None:
        self._under_way.discard(delivery)
        if not delivery.cancelled() and (error := delivery.exception()) is not None:
            log.error("Submission failed", exc_info=error)

    async def _deliver(self, assignment: Assignment, result: bytes, again: bool) -> None:
        """Spool, send, learn the outcome, forget. If this is interrupted, the result stays in the spool."""
        hotkey, task = assignment.validator.hotkey, assignment.task
        kept = self._kept.get((hotkey, task.id)) if again else None
        is_new = kept is None
        if kept is None:
            kept = self._kept[hotkey, task.id] = _Kept(len(result), self._now(), self._now())
        try:
            if is_new:
                await self._keep(assignment, kept, result)
            if kept.size is None:
                kept.size = len(result)
            ask_again_at = await self._submit_round(assignment, kept, result)
            if ask_again_at is None:
                await self._keep(assignment, kept, b"")
                ask_again_at = await self._submit_round(assignment, kept, b"")
            kept.ask_again_at = ask_again_at
        finally:
            assignment.settle(self._now() + DEFAULT_PAUSE_S if kept.ask_again_at is None else kept.ask_again_at)

    async def _keep(self, assignment: Assignment, kept: _Kept, result: bytes) -> None:
        entry = SpooledResult(assignment.validator.hotkey, assignment.task, result)
        try:
            await asyncio.to_thread(self._spool.put, entry)
            kept.in_memory = None
        except OSError as error:
            kept.in_memory = entry
            log.error(
                "Spool %s: %s; the result for validator [%d] is in memory alone",
                self._spool.folder,
                error.strerror or error,
                assignment.validator.uid,
            )

    def _forget(self, hotkey: str, task_id: str) -> None:
        self._spool.remove(hotkey, task_id)
        self._kept.pop((hotkey, task_id), None)

    async def _submit_round(self, assignment: Assignment, kept: _Kept, result: bytes) -> float | None:
        """Submits. Returns when the validator may be asked again, or None to end the task with an empty result.

        If the outcome is not known, that time is soon, because the next pull tells it.
        """
        validator, shown = assignment.validator, quoted(assignment.task.id)
        kept.rounds += 1
        kept.still_open_at = self._now()
        answer = await self._send(assignment, result, kept)
        if answer is None:
            if kept.rounds >= MAX_ROUNDS or (kept.rounds > 1 and kept.seconds_tried >= RETRY_FOR_S):
                return self._give_up(assignment, kept, result, "given_up")
            log.warning("Validator [%d] gave no answer to %s: its next pull decides", validator.uid, shown)
            return self._ask_again_after(SOON_S, validator, kept)
        status = _status_code(answer)
        if status == 403:
            kept.refused, kept.reason = True, status_of(answer)
            if kept.rounds >= MAX_ROUNDS:
                return self._give_up(assignment, kept, result, "refused")
            log.warning("Validator [%d] has no task for %s: its next pull tells more", validator.uid, shown)
            return self._ask_again_after(SOON_S, validator, kept)
        if status != 200:
            kept.reason = status_of(answer)
            return self._give_up(assignment, kept, result, "refused")
        log.info("Task submitted to validator [%d]: %s, %d bytes", validator.uid, shown, len(result))
        if answer.is_success and answer.feedback is not None:
            return self._handle_feedback(assignment, kept, result, answer, answer.feedback)
        kept.may_have_arrived = True
        why = "" if answer.is_success else f", for its answer is not readable: {status_of(answer)}"
        line = "Validator [%d] does not say what became of %s%s; its next pull tells more"
        log.warning(line, validator.uid, shown, why)
        if answer.is_success and answer.cooldown_until > 0:
            return self._clocks.next_pull_at(validator.hotkey, answer.cooldown_until)
        return self._ask_again_after(SOON_S, validator, kept)

    def _ask_again_after(self, seconds: float, validator: Neuron, kept: _Kept) -> float:
        """When to ask a validator again that did not tell this result's outcome."""
        if kept.rounds == 1:
            self._untold[validator.hotkey] += 1
        doublings = min(max(self._untold[validator.hotkey] - 1, 0), 10)
        return self._now() + min(seconds * 2.0**doublings, MAX_PAUSE_S)

    def _handle_feedback(
        self, assignment: Assignment, kept: _Kept, result: bytes, answer: SubmitResults, feedback: Feedback
    ) -> float | None:
        """Handles an answer with feedback. Returns as `_submit_round` does."""
        validator, task, until = assignment.validator, assignment.task, answer.cooldown_until
        hotkey = validator.hotkey
        outcome, settled = self._outcomes[hotkey].answered(
            task.id,
            len(result),
            feedback,
            until,
            self._clocks.ahead(hotkey, until),
            Span(kept.first_sent - ANSWER_S, self._now()),
            kept.may_have_arrived,
        )
        for each in settled:
            log.info("Validator [%d]'s count tells of %s, whose answer was lost", validator.uid, quoted(each.task_id))
            _log_outcome(validator, each.task_id, each.outcome)
            self._record(Settlement(validator, each.task_id, each.outcome))
        if outcome is None:
            kept.may_have_arrived = True
            if kept.rounds >= MAX_ROUNDS:
                return self._give_up(assignment, kept, result, "given_up")
            log.info(
                "Validator [%d] says nothing of %s: it is at work on it, or has another task; its next pull tells more",
                *(validator.uid, quoted(task.id)),
            )
            return self._ask_again_after(LOCK_S, validator, kept)
        self._untold.pop(hotkey, None)
        self._forget(hotkey, task.id)
        log.info(
            "Feedback from [%d]: Score=%.2f, Reward=%.2f (average %.2f, %d accepted in the window, rating %.0f)",
            validator.uid,
            feedback.task_fidelity_score,
            feedback.current_miner_reward,
            feedback.average_fidelity_score,
            feedback.generations_within_the_window,
            feedback.current_duel_rating,
        )
        ask_again_at = kept.ask_again_at = self._clocks.next_pull_at(hotkey, until)
        if outcome == "empty" and kept.given_up is not None:
            outcome = kept.given_up
        self._conclude(validator, task.id, kept, outcome, feedback, ask_again_at)
        return ask_again_at

    def _give_up(self, assignment: Assignment, kept: _Kept, result: bytes, outcome: SubmissionOutcome) -> float | None:
        """Ends the task with an empty result, since its validator gives out no other one before."""
        validator, task = assignment.validator, assignment.task
        kept.given_up = kept.given_up or outcome
        if result:
            log.error(
                "Validator [%d] does not take %s (%s): its task is ended with an empty result",
                *(validator.uid, quoted(task.id), kept.reason),
            )
            return None
        # The empty result was refused, too. Keep it as long as the validator asks for it.
        self._conclude(validator, task.id, kept, kept.given_up)
        return self._now() + MAX_PAUSE_S

    async def _send(self, assignment: Assignment, result: bytes, kept: _Kept) -> SubmitResults | None:
        """The validator's answer, even a refusal; None if none came and none is expected for a while."""
        started = self._now()
        first_lost: float | None = None

        async def attempt() -> SubmitResults:
            nonlocal first_lost
            # Its current address: it may have moved since the pull.
            validator = self._directory.eligible.get(assignment.validator.hotkey, assignment.validator)
            submission = make_submission(assignment.task, result, validator.hotkey, self._keypair)
            sent = self._now()
            answer = await self._dendrite.call(
                validator.axon_info(), submission, timeout=SUBMIT_TIMEOUT_S, deserialize=False
            )
            if not _is_final(answer) and _may_have_arrived(answer):
                kept.may_have_arrived = True
                first_lost = sent if first_lost is None else first_lost
            return answer

        def is_too_late(state: RetryCallState) -> bool:
            until = started + RETRY_FOR_S if first_lost is None else first_lost + UNDER_LOCK_S
            return self._now() + state.upcoming_sleep > until

        def log_retry(state: RetryCallState) -> None:
            log.warning(
                "Submission to validator [%d] failed: %s; next attempt in %.1f s",
                *(assignment.validator.uid, _reason(state), state.upcoming_sleep),
            )

        def leave_off(state: RetryCallState) -> None:
            kept.seconds_tried += self._now() - started
            kept.reason = _reason(state)

        pause = wait_exponential(FIRST_RETRY_S, max=MAX_RETRY_S)
        retrying = AsyncRetrying(
            retry=retry_if_result(lambda answer: not _is_final(answer)),
            wait=lambda state: pause(state) * random.uniform(0.5, 1.5),
            stop=is_too_late,
            before_sleep=log_retry,
            retry_error_callback=leave_off,
        )
        return await retrying(attempt)

    def _drop(self, validator: Neuron, task_id: str, answer: PullTask) -> None:
        """The validator's pull did not ask for this result: its task is over, or forgotten."""
        hotkey, now = validator.hotkey, self._now()
        kept, outcomes = self._kept[hotkey, task_id], self._outcomes[hotkey]
        is_empty = self._spool.is_empty(hotkey, task_id) if kept.size is None else kept.size == 0
        self._forget(hotkey, task_id)
        # The answer to an unregistered miner is no cooldown, and counts no violation.
        cooling = answer.task is None and answer.cooldown_violations > 0
        ask_again_at = self._clocks.next_pull_at(hotkey, answer.cooldown_until) if cooling else None
        outcome: SubmissionOutcome = kept.given_up or ("refused" if kept.refused else "given_up")
        if kept.may_have_arrived:
            declined = None
            if cooling:
                ahead = self._clocks.ahead(hotkey, answer.cooldown_until)
                declined = outcomes.is_penalty(ahead, now - kept.still_open_at)
            outcome = "empty" if is_empty else "declined" if declined else "unknown"
            if declined is None:
                ask_again_at = None  # recorded so in the ledger; the pull's row has the time
        if outcome == "unknown" and not kept.recorded:
            span = Span(kept.first_sent - ANSWER_S, now)
            outcomes.lost(task_id, span, "unknown" if ask_again_at is None else "broken")
        self._conclude(validator, task_id, kept, outcome, None, ask_again_at)

    def _conclude(
        self,
        validator: Neuron,
        task_id: str,
        kept: _Kept,
        outcome: SubmissionOutcome,
        feedback: Feedback | None = None,
        ask_again_at: float | None = None,
    ) -> None:
        """Records a result's outcome, once."""
        if kept.recorded:
            return
        kept.recorded = True
        reason = kept.reason if outcome in ("refused", "given_up") else ""
        _log_outcome(validator, task_id, outcome, reason)
        seconds = self._now() - kept.first_sent
        self._record(Submission(validator, task_id, outcome, seconds, kept.size or 0, feedback, ask_again_at, reason))


_OUTCOME_LINES: dict[SubmissionOutcome, tuple[int, str]] = {
    "accepted": (logging.INFO, "Accepted: validator [%d] took %s"),
    "declined": (logging.WARNING, "Validation failed: validator [%d] did not accept %s"),
    "broken": (logging.WARNING, "Validator [%d] could not score %s: its scoring gave no answer, which costs nothing"),
    "empty": (logging.INFO, "Validator [%d] knows that there is no result for %s, which costs nothing"),
    "refused": (logging.ERROR, "Submission to validator [%d] refused: %s"),
    "given_up": (logging.ERROR, "Submission to validator [%d] given up: %s"),
    "unknown": (logging.WARNING, "Validator [%d] does not tell what became of %s"),
}


def _log_outcome(validator: Neuron, task_id: str, outcome: SubmissionOutcome, reason: str = "") -> None:
    level, line = _OUTCOME_LINES[outcome]
    log.log(level, line + (f", {reason}" if reason else ""), validator.uid, quoted(task_id))


def _is_final(answer: bt.Synapse) -> bool:
    """Whether the validator has the result (status 200, readable or not), or has finally refused it."""
    status = _status_code(answer)
    return status is not None and (status == 200 or 400 <= status < 500) and status not in PASSING_STATUSES


def _may_have_arrived(answer: bt.Synapse) -> bool:
    """Whether the validator may still be working on a submission without an answer."""
    status = _status_code(answer)
    if status is not None:
        return status >= 500
    return answer.dendrite is None or answer.dendrite.status_code != NO_CONNECTION


def _reason(state: RetryCallState) -> str:
    assert state.outcome is not None
    return status_of(state.outcome.result())


def _status_code(answer: bt.Synapse) -> int | None:
    return None if answer.axon is None else answer.axon.status_code


def status_of(answer: bt.Synapse) -> str:
    """The status of a call and its message, fit for a log line."""
    terminal = answer.dendrite
    return "no answer" if terminal is None else f"{terminal.status_code} {quoted(terminal.status_message)}"
