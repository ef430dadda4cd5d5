"""Asks all eligible validators for tasks at once, each by its own clock, and queues what they hand out."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import Counter

from neurons.chain import Neuron
from neurons.logging_setup import quoted
from neurons.miner.assignment import Assignment, next_pull_at, usable_threshold
from neurons.miner.spool import Spool, SpooledResult
from neurons.miner.submitter import Submitter, ValidatorCaller
from neurons.miner.validators import ValidatorDirectory
from neurons.protocol import PULL_TIMEOUT_S, PullTask

FIRST_RETRY_S = 5.0
MAX_RETRY_S = 300.0

log = logging.getLogger(__name__)


class AsyncTaskManager:
    """One poller per validator. A validator gives a miner one task at a time, so a poller that holds a task waits
    until it is settled: the queue never sees the same task twice.

    `generator_ready` holds pulling back while there is nobody to work on a task.
    """

    def __init__(
        self,
        dendrite: ValidatorCaller,
        directory: ValidatorDirectory,
        submitter: Submitter,
        spool: Spool,
        generator_ready: asyncio.Event,
        totals: Counter[str],
        *,
        workers: int,
        threshold: float,
    ) -> None:
        self._dendrite = dendrite
        self._directory = directory
        self._submitter = submitter
        self._spool = spool
        self._generator_ready = generator_ready
        self._totals = totals
        self._workers = workers
        self._threshold = threshold
        # Two per worker: one in work, one ready to follow it. More would only grow old.
        self._queue: asyncio.Queue[Assignment | None] = asyncio.Queue(maxsize=2 * workers)
        self._room = asyncio.Event()
        self._pollers: dict[str, asyncio.Task[None]] = {}
        self._asked: set[str] = set()
        self._spooled: dict[str, list[SpooledResult]] = {}
        for entry in spool.load():
            self._spooled.setdefault(entry.validator_hotkey, []).append(entry)
        self.first_round_done = asyncio.Event()
        self.cooldowns: dict[str, float] = {}  # hotkey -> unix time until which its poller sleeps

    def poll_eligible(self) -> None:
        """Starts a poller for every eligible validator that has none. To be called when the directory changed."""
        for hotkey in self._directory.eligible:
            if hotkey not in self._pollers:
                poller = asyncio.create_task(self._poll(hotkey))
                self._pollers[hotkey] = poller
                poller.add_done_callback(functools.partial(self._poller_ended, hotkey))

    async def next_assignment(self) -> Assignment | None:
        """The next task to work on; None once the manager is closed."""
        assignment = await self._queue.get()
        self._room.set()
        return assignment

    async def close(self) -> None:
        """Stops polling and forgets queued tasks: their validators give them out again."""
        pollers = list(self._pollers.values())
        for poller in pollers:
            poller.cancel()
        await asyncio.gather(*pollers, return_exceptions=True)
        while not self._queue.empty():
            self._queue.get_nowait()
        for _ in range(self._workers):
            self._queue.put_nowait(None)

    @property
    def queued(self) -> int:
        return self._queue.qsize()

    def _poller_ended(self, hotkey: str, poller: asyncio.Task[None]) -> None:
        self._pollers.pop(hotkey, None)
        self.cooldowns.pop(hotkey, None)
        if not poller.cancelled() and (error := poller.exception()) is not None:
            log.error("Polling of %s ended; it starts again at the next sync", hotkey, exc_info=error)

    async def _poll(self, hotkey: str) -> None:
        ask_again_at = await self._resubmit(hotkey)
        failures = 0
        while True:
            await self._sleep_until(hotkey, ask_again_at)
            await self._generator_ready.wait()
            await self._wait_for_room(hotkey)
            validator = self._directory.eligible.get(hotkey)
            if validator is None:
                return
            response = await self._pull(validator)
            self._mark_asked(hotkey)
            if response is None:
                ask_again_at = time.time() + min(FIRST_RETRY_S * 2**failures, MAX_RETRY_S)
                failures = min(failures + 1, 10)
                continue
            failures = 0
            if response.task is None:
                ask_again_at = next_pull_at(response.cooldown_until)
            else:
                ask_again_at = await self._work_off(validator, response)

    async def _resubmit(self, hotkey: str) -> float:
        """Hands in what an earlier run left in the spool for this validator."""
        ask_again_at = 0.0
        for entry in self._spooled.pop(hotkey, []):
            validator = self._directory.eligible.get(hotkey)
            if validator is not None:
                log.info("Validator [%d]: submitting a spooled result, %s", validator.uid, quoted(entry.task.id))
                assignment = Assignment(validator, entry.task, self._threshold)
                self._submitter.submit(assignment, entry.result)
                ask_again_at = await assignment.settled
        return ask_again_at

    async def _pull(self, validator: Neuron) -> PullTask | None:
        response = await self._dendrite.call(
            validator.axon_info(), PullTask(), timeout=PULL_TIMEOUT_S, deserialize=False
        )
        if response.is_success:
            return response
        terminal = response.dendrite
        status = "no answer" if terminal is None else f"{terminal.status_code} {quoted(terminal.status_message)}"
        log.warning("Pull from validator [%d] failed: %s", validator.uid, status)
        return None

    async def _work_off(self, validator: Neuron, response: PullTask) -> float:
        """Sees a pulled task through; returns the unix time from which the validator may be asked again."""
        task = response.task
        assert task is not None
        shown = quoted(task.prompt) if task.type == "text" else f"image, {len(task.prompt)} characters"
        log.info("Task pulled from validator [%d]: %s, %s", validator.uid, quoted(task.id), shown)
        self._totals["pulled"] += 1
        threshold = usable_threshold(response.validation_threshold, self._threshold)
        assignment = Assignment(validator, task, threshold)
        spooled = await asyncio.to_thread(self._spool.get, validator.hotkey, task)
        if spooled is not None:
            self._submitter.submit(assignment, spooled.result)
        else:
            await self._queue.put(assignment)
        return await assignment.settled

    async def _sleep_until(self, hotkey: str, unix_time: float) -> None:
        self.cooldowns[hotkey] = unix_time
        try:
            while (left := unix_time - time.time()) > 0:
                await asyncio.sleep(left)
        finally:
            self.cooldowns.pop(hotkey, None)

    async def _wait_for_room(self, hotkey: str) -> None:
        while self._queue.full():
            self._mark_asked(hotkey)
            self._room.clear()
            await self._room.wait()

    def _mark_asked(self, hotkey: str) -> None:
        self._asked.add(hotkey)
        if self._asked >= self._directory.eligible.keys():
            self.first_round_done.set()
