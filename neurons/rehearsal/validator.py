"""One validator of the rehearsal: a real bittensor axon in front of the rules."""

# No `from __future__ import annotations` here: Axon.attach compares the annotations themselves.

import asyncio
import logging
import math
import socket
from typing import Tuple  # noqa: UP035

import bittensor as bt

from neurons.logging_setup import quoted
from neurons.protocol import PullTask, SubmitResults
from neurons.rehearsal.checks import Unacceptable, check_submission
from neurons.rehearsal.rules import Rules
from neurons.rehearsal.scoring import ScoringService

log = logging.getLogger(__name__)


class RehearsalValidator:
    """Serves PullTask and SubmitResults on a loopback port of the system's choice."""

    def __init__(self, uid: int, wallet: bt.Wallet, rules: Rules, scoring: ScoringService) -> None:
        self.uid = uid
        self.hotkey: str = wallet.hotkey.ss58_address
        self.rules = rules
        self.pulls = 0
        self._scoring = scoring
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._axon = bt.Axon(
            wallet=wallet,
            ip="127.0.0.1",
            port=self.port,
            # Named, so that the axon does not ask the internet for it.
            external_ip="127.0.0.1",
            external_port=self.port,
            max_workers=1,
        )
        self._axon.attach(forward_fn=self._pull_task)
        self._axon.attach(forward_fn=self._submit_results, blacklist_fn=self._refuse_submission)

    @property
    def started(self) -> bool:
        return self._axon.fast_server.started

    async def serve(self) -> None:
        """Answers until `stop`. Axon.start would listen on all interfaces, and burn CPU in a thread per validator."""
        await self._axon.fast_server.serve(sockets=[self._socket])

    def stop(self) -> None:
        self._axon.fast_server.should_exit = True

    async def _pull_task(self, synapse: PullTask) -> PullTask:
        hotkey = _sender(synapse)
        self.pulls += 1
        answer = self.rules.pull(hotkey)
        limits = self.rules.limits
        synapse.task = answer.task
        synapse.validation_threshold = limits.validation_threshold
        synapse.throttle_period = math.ceil(limits.throttle_period)
        synapse.cooldown_until = answer.cooldown_until
        synapse.cooldown_violations = answer.violations
        if answer.task is not None:
            log.info("[%d] task %s, %s, is with %s", self.uid, answer.task.id, quoted(answer.task.prompt), hotkey)
        else:
            log.warning("[%d] pull by %s refused, %d violations", self.uid, hotkey, answer.violations)
        return synapse

    def _refuse_submission(self, synapse: SubmitResults) -> Tuple[bool, str]:  # noqa: UP006
        reason = self.rules.reason_to_refuse(_sender(synapse))
        if reason is not None:
            log.warning("[%d] submission by %s refused: %s", self.uid, quoted(_sender(synapse)), reason)
        return reason is not None, reason or ""

    async def _submit_results(self, synapse: SubmitResults) -> SubmitResults:
        hotkey = _sender(synapse)
        failed = False
        synapse.cooldown_until = 0  # which it stays for a resubmission
        task = self.rules.begin_validation(hotkey, synapse.task_id or (synapse.task.id if synapse.task else ""))
        if task is None:
            log.info("[%d] resubmission by %s", self.uid, hotkey)
        else:
            score: float | None = None
            reason = ""
            try:
                if synapse.results:
                    await asyncio.to_thread(check_submission, synapse, task, self.hotkey, hotkey)
                    score = await self._scoring.score(task.prompt, synapse.results)
            except Unacceptable as error:
                score, reason = 0.0, str(error)
            except BaseException as error:
                # The task stays with the miner; the axon answers 500.
                log.error("[%d] could not validate: %s", self.uid, error)
                self.rules.abandon_validation(hotkey)
                raise
            accepted = self.rules.finish_validation(hotkey, score)
            failed = score is not None and not accepted
            self._log_verdict(hotkey, task.prompt, score, accepted, reason)
            synapse.cooldown_until = self.rules.cooldown_until(hotkey)
        synapse.feedback = self.rules.feedback(hotkey, validation_failed=failed)
        synapse.results = ""  # what came in need not go back
        return synapse

    def _log_verdict(self, hotkey: str, prompt: str, score: float | None, accepted: bool, reason: str) -> None:
        verdict = "accepted" if accepted else "empty" if score is None else "failed"
        feedback = self.rules.feedback(hotkey)
        log.info(
            "[%d] %s: %s, score %.3f%s; average %.3f over %d accepted in the window, %d violations",
            self.uid,
            verdict,
            quoted(prompt),
            score or 0.0,
            f" ({quoted(reason)})" if reason else "",
            feedback.average_fidelity_score,
            feedback.generations_within_the_window,
            self.rules.miners[hotkey].violations,
        )


def _sender(synapse: bt.Synapse) -> str:
    return (synapse.dendrite.hotkey if synapse.dendrite is not None else None) or ""
