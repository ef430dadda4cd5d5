"""One validator of the rehearsal: a real bittensor axon in front of the rules."""

# No `from __future__ import annotations` here: Axon.attach compares the annotations themselves.

import asyncio
import logging
import socket
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Tuple  # noqa: UP035

import bittensor as bt

from common.log_lines import quoted
from neurons.protocol import PullTask, SubmitResults, Task
from neurons.rehearsal.checks import signature_matches
from neurons.rehearsal.rules import Judgement, Rules
from neurons.rehearsal.scoring import FixedScores, Scoring
from neurons.rehearsal.troubles import CRASH_DELAY_S, CRASH_EVERY_TASKS, NONE, OUTAGE_S, TROUBLES
from neurons.rehearsal.truth import TruthFile

log = logging.getLogger(__name__)

_hang_up: ContextVar[Callable[[], None]] = ContextVar("hang_up")


class RehearsalValidator:
    """Serves PullTask and SubmitResults on a loopback port of the system's choice.

    `kind` is one of TROUBLES, if any. `state` is the file that survives a clean end, and is as old as its last saving
    after any other; without one nothing survives.
    """

    def __init__(
        self,
        uid: int,
        wallet: bt.Wallet,
        rules: Rules,
        scoring: Scoring,
        kind: str = "",
        state: Path | None = None,
        truth: TruthFile | None = None,
    ) -> None:
        self.uid = uid
        self.kind = kind
        self.hotkey: str = wallet.hotkey.ss58_address
        self.rules = rules
        self.pulls = 0
        self._trouble = trouble = TROUBLES.get(kind, NONE)
        self._scoring = scoring if trouble.score == "asked for" else FixedScores(trouble.score)
        self._state = state
        self._saved: str | None = None
        self._truth = truth
        self._tasks = 0
        self._crash_due = False
        self._under_way: set[asyncio.Task[Any]] = set()
        self._connections: set[asyncio.BaseTransport] = set()
        self._down = False
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
        self._axon.fast_config.app = self._connected
        self._axon.fast_config.interface = "asgi3"  # which it does not see in a method

    @property
    def started(self) -> bool:
        """Whether its axon is there to be called."""
        return self._axon.fast_server.started

    async def serve(self) -> None:
        """Answers until `stop`. Axon.start would listen on all interfaces, and burn CPU in a thread per validator."""
        self._restore()
        self._note("start")
        saving = asyncio.create_task(self._save_now_and_then())
        try:
            await self._axon.fast_server.serve(sockets=[self._socket])
        finally:
            saving.cancel()
            self.save()

    def stop(self) -> None:
        """Ends its axon."""
        self._axon.fast_server.should_exit = True

    def save(self) -> None:
        """Writes its state to its file, where it has one. Raises OSError."""
        self._saved = self.rules.saved()
        if self._state is not None:
            temporary = self._state.with_suffix(".tmp")
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self._saved, encoding="utf-8")
            temporary.replace(self._state)

    async def crash(self) -> None:
        """Loses what came since the last saving, connections and scoring included, and comes back after a while."""
        log.warning("[%d] crash", self.uid)
        self._note("crash")
        self._down = True
        for connection in list(self._connections):
            connection.abort()  # type: ignore[attr-defined]
        for work in self._under_way - {asyncio.current_task()}:
            work.cancel()
        self.rules.restore(None if self._trouble.crashes == "without state" else self._saved)
        await asyncio.sleep(OUTAGE_S * self.rules.limits.second)
        self._axon.nonces.clear()
        self._down = False

    def _restore(self) -> None:
        if self._state is None or not self._state.exists():
            return
        try:
            self._saved = self._state.read_text(encoding="utf-8")
            self.rules.restore(self._saved)
        except (OSError, ValueError) as error:
            log.error("[%d] %s can not be used: %s", self.uid, self._state, error)

    async def _save_now_and_then(self) -> None:
        while self._trouble.crashes == "never":
            await asyncio.sleep(self.rules.limits.state_interval)
            self.save()

    async def _connected(self, scope: Any, receive: Any, send: Any) -> None:
        """In front of the axon: knows the connections, which an ASGI application is not told of."""
        if scope["type"] != "http":
            await self._axon.app(scope, receive, send)
            return
        connection = send.__self__.transport  # of uvicorn's request
        if self._down:
            connection.abort()
            return
        self._connections.add(connection)
        _hang_up.set(connection.abort)
        try:
            await self._axon.app(scope, receive, send)
        finally:
            self._connections.discard(connection)

    async def _pull_task(self, synapse: PullTask) -> PullTask:
        hotkey = _sender(synapse)
        self.pulls += 1
        miner = self.rules.miners.get(hotkey)
        had = miner.task if miner is not None else None
        answer = self.rules.pull(hotkey)
        synapse.task = answer.task
        synapse.validation_threshold = answer.validation_threshold
        synapse.throttle_period = answer.throttle_period
        synapse.cooldown_until = answer.cooldown_until
        synapse.cooldown_violations = answer.violations
        task = answer.task
        if task is not None:
            event = "again" if task == had else "assigned"
            log.info("[%d] task %s, %s, is with %s", self.uid, task.id, _quoted_prompt(task), hotkey)
            if event == "assigned":
                self._tasks += 1
                self._plan_a_crash()
        else:
            event = "early" if answer.violations else "unregistered"
            log.warning("[%d] pull by %s refused, %s, %d violations", self.uid, hotkey, event, answer.violations)
        self._note(
            event,
            miner=hotkey,
            task=None if task is None else task.id,
            type=None if task is None else task.type,
            cooldown_until=answer.cooldown_until,
            violations=miner.violations if miner is not None else 0,
        )
        return synapse

    def _plan_a_crash(self) -> None:
        if self._tasks % CRASH_EVERY_TASKS == 0:
            if self._trouble.crashes == "with old state":
                self.save()
                self._crash_due = True  # once its result is judged
            elif self._trouble.crashes == "without state":
                self._start_background(self._crash_soon())

    async def _crash_soon(self) -> None:
        await asyncio.sleep(CRASH_DELAY_S * self.rules.limits.second)
        await self.crash()

    def _start_background(self, work: Any) -> "asyncio.Task[Any]":
        """Starts work that does not end with the request."""
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    def _refuse_submission(self, synapse: SubmitResults) -> Tuple[bool, str]:  # noqa: UP006
        hotkey = _sender(synapse)
        reason = self.rules.reason_to_refuse(hotkey)
        if reason is not None:
            log.warning("[%d] submission by %s refused: %s", self.uid, quoted(hotkey), reason)
            self._note("submission", miner=hotkey, task=_task_id(synapse), outcome="refused", reason=reason)
        return reason is not None, reason or ""

    async def _submit_results(self, synapse: SubmitResults) -> SubmitResults:
        judgement = await asyncio.shield(self._start_background(self._judge(synapse)))
        synapse.feedback = judgement.feedback
        synapse.cooldown_until = judgement.cooldown_until
        synapse.results = ""  # what came in need not go back
        synapse.signature = ""
        return synapse

    async def _judge(self, synapse: SubmitResults) -> Judgement:
        hotkey = _sender(synapse)
        began = self.rules.clock()
        lost = False
        hangs_up = self._trouble.hangs_up if self._tasks % 2 else "never"

        def signed(task: Task) -> bool:
            return signature_matches(synapse, task, self.hotkey, hotkey)

        task = self.rules.miners[hotkey].task
        verdict = self.rules.receive(hotkey, _task_id(synapse), signed, empty=not synapse.results)
        if not isinstance(verdict, Judgement):
            if hangs_up == "while scoring":
                _hang_up.get()()
                lost = True
            seconds = self._trouble.scoring_seconds * self.rules.limits.second
            score, _ = await asyncio.gather(self._scoring.score(verdict, synapse.results), asyncio.sleep(seconds))
            verdict = self.rules.score(hotkey, score)
        if hangs_up == "for the answer":
            _hang_up.get()()
            lost = True
        self._log(hotkey, task, verdict)
        miner = self.rules.miners[hotkey]
        self._note(
            "submission",
            miner=hotkey,
            task=_task_id(synapse),
            outcome=verdict.outcome,
            reason=verdict.reason,
            score=verdict.score,
            began=began,
            lost=lost,
            window=verdict.feedback.generations_within_the_window,
            cooldown_until=verdict.cooldown_until,
            violations=miner.violations,
        )
        if self._crash_due and verdict.outcome != "repetition":
            self._crash_due = False
            self._start_background(self._crash_soon())
        return verdict

    def _log(self, hotkey: str, task: Task | None, judgement: Judgement) -> None:
        feedback = judgement.feedback
        log.info(
            "[%d] %s: %s, score %.3f%s; average %.3f, %d accepted in the window, %d violations",
            self.uid,
            judgement.outcome,
            _quoted_prompt(task) if task is not None else "nothing",
            judgement.score or 0.0,
            f" ({judgement.reason})" if judgement.reason else "",
            feedback.average_fidelity_score,
            feedback.generations_within_the_window,
            self.rules.miners[hotkey].violations,
        )

    def _note(self, event: str, **fields: object) -> None:
        if self._truth is not None:
            self._truth.note(time=self.rules.clock(), uid=self.uid, validator=self.hotkey, event=event, **fields)


def _task_id(synapse: SubmitResults) -> str:
    return synapse.task_id or (synapse.task.id if synapse.task is not None else "")


def _quoted_prompt(task: Task) -> str:
    return quoted(task.prompt) if task.type == "text" else f"a picture of {len(task.prompt) * 3 // 4} bytes"


def _sender(synapse: bt.Synapse) -> str:
    return (synapse.dendrite.hotkey if synapse.dendrite is not None else None) or ""
