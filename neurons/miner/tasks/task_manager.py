"""Decides when each eligible validator is asked for a task, asks all concurrently, and queues their tasks."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from common.log_lines import quoted
from neurons.chain import Neuron
from neurons.miner.assignment import Assignment, usable_threshold
from neurons.miner.records.events import Pull, PullOutcome, Recorder
from neurons.miner.submission.submitter import Submitter, ValidatorCaller, status_of
from neurons.miner.supervisor import keep_running
from neurons.miner.tasks.admission import Admission, Forecast, Place
from neurons.miner.tasks.phases import Phases
from neurons.miner.validators.clock import ValidatorClocks
from neurons.miner.validators.directory import ValidatorDirectory
from neurons.protocol import PULL_TIMEOUT_S, PullTask

# Seconds after a pull without an answer, and after a refusal: doubled with each one in a row.
FIRST_RETRY_S = 5.0
FIRST_REFUSAL_PAUSE_S = 1.0
MAX_RETRY_S = 300.0
# A validator tells a miner that is not registered to come back in an hour. A miner that has just registered hears that
# until the validator reads the chain again, minutes later: so it asks sooner. Such pulls count no violation, unlike
# pulls during a cooldown.
UNREGISTERED_S = (3500.0, 3700.0)
UNREGISTERED_RETRY_S = 300.0
# Seconds until the policy is asked again about a validator that is not worth a pull.
RECONSIDER_S = 60.0
# Longest throttle period that is believed: no task is held longer for more candidates.
MAX_THROTTLE_S = 60.0

log = logging.getLogger(__name__)


class Generators(Forecast, Protocol):
    """What the task manager needs of a GeneratorPool. `ready` is set while a service can take a task."""

    ready: asyncio.Event


class AsyncTaskManager:
    """One poller per validator.

    A validator gives a miner one task at a time, so a poller that holds a task waits until it is settled. The queue
    never holds the same task twice, or two of one validator. There are no pulls while no generator is ready, or while
    the held tasks keep the generators busy for long enough.
    """

    def __init__(
        self,
        dendrite: ValidatorCaller,
        directory: ValidatorDirectory,
        clocks: ValidatorClocks,
        submitter: Submitter,
        generators: Generators,
        record: Recorder,
        *,
        workers: int,
        threshold: float,
        cooldowns: Mapping[str, float],
        worth_asking_at: Callable[[str], float],
        phases: Phases,
    ) -> None:
        """`cooldowns`: hotkey -> unix time until which the validator may not be asked, from an earlier run.
        `worth_asking_at`: hotkey -> unix time from which a pull is worth its cost. `phases` spreads the pulls.
        """
        self._dendrite = dendrite
        self._directory = directory
        self._clocks = clocks
        self._now = clocks.now
        self._submitter = submitter
        self._generators = generators
        self._record = record
        self._threshold = threshold
        self._known_cooldowns = dict(cooldowns)
        self._worth_asking_at = worth_asking_at
        self._phases = phases
        self._admission = Admission(generators, workers)
        self._places: dict[Assignment, Place] = {}
        self._queue: asyncio.Queue[Assignment | None] = asyncio.Queue()
        self._pollers: dict[str, asyncio.Task[None]] = {}
        self._addresses: dict[str, tuple[str, int]] = {}
        self._backing_off: dict[str, asyncio.Event] = {}
        self._asked: set[str] = set()
        self._given: dict[str, tuple[str, float]] = {}  # hotkey -> its latest task's id, and when that was first pulled
        self.first_round_done = asyncio.Event()
        self.closing = asyncio.Event()
        self.working: set[Assignment] = set()
        self.cooldowns: dict[str, float] = {}  # hotkey -> unix time until which its poller sleeps

    def sync(self) -> None:
        """Starts and stops pollers, so that exactly the eligible validators are polled. To be called after changes."""
        eligible = self._directory.eligible
        for hotkey in self._pollers.keys() - eligible.keys():
            # A poller that holds a task finishes it first.
            if hotkey in self.cooldowns or hotkey in self._backing_off:
                self._pollers[hotkey].cancel()
        for hotkey, validator in eligible.items():
            address = validator.ip, validator.port
            if self._addresses.get(hotkey, address) != address and hotkey in self._backing_off:
                self._backing_off[hotkey].set()
            poller = self._pollers.get(hotkey)
            # A poller that was cancelled, or has just ended, counts as none.
            if poller is None or poller.done() or poller.cancelling():
                name = f"Polling of validator [{validator.uid}]"
                poller = asyncio.create_task(keep_running(name, functools.partial(self._poll, hotkey)))
                self._pollers[hotkey] = poller
                poller.add_done_callback(functools.partial(self._poller_ended, hotkey))
        self._addresses = {hotkey: (validator.ip, validator.port) for hotkey, validator in eligible.items()}
        self._asked &= eligible.keys()
        now = self._now()
        self._known_cooldowns = {hotkey: until for hotkey, until in self._known_cooldowns.items() if until > now}
        self._clocks.keep(self._pollers.keys())
        self._phases.keep(self._pollers.keys())

    async def next_assignment(self) -> Assignment | None:
        """The next task to work on; None once the manager is closed. Call `finished` with it when it is generated."""
        assignment = await self._queue.get()
        if assignment is None:
            self._queue.put_nowait(None)  # for the other workers
        else:
            self.working.add(assignment)
        return assignment

    def finished(self, assignment: Assignment) -> None:
        """Frees the task's place, as its generation is over."""
        self.working.discard(assignment)
        place = self._places.get(assignment)
        if place is not None:
            place.leave()

    async def close(self) -> None:
        """Stops polling and forgets queued tasks: their validators give them out again."""
        self.closing.set()
        pollers = list(self._pollers.values())
        for poller in pollers:
            poller.cancel()
        await asyncio.gather(*pollers, return_exceptions=True)
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    @property
    def held(self) -> Collection[Assignment]:
        """Tasks pulled and not settled yet, save those that came out of the spool."""
        return self._places.keys()

    @property
    def silent(self) -> int:
        """Number of validators that gave no answer and are not asked for a while."""
        return len(self._backing_off)

    @property
    def in_generation(self) -> int:
        """Number of tasks in generation or waiting for it."""
        return len(self.working) + self.queued

    @property
    def queued(self) -> int:
        """Number of tasks that wait for a worker."""
        return self._queue.qsize()

    def _poller_ended(self, hotkey: str, poller: asyncio.Task[None]) -> None:
        if self._pollers.get(hotkey) is poller:
            del self._pollers[hotkey]

    async def _poll(self, hotkey: str) -> None:
        """Polls the validator until it is not eligible any more."""
        ask_again_at = self._known_cooldowns.get(hotkey, 0.0)
        failures = refusals = 0
        while True:
            # Kept for this validator's next poller, after an error or an absence.
            self._known_cooldowns[hotkey] = ask_again_at
            await self._sleep_until(hotkey, ask_again_at)
            place = await self._admitted(hotkey)
            try:
                validator = self._directory.eligible.get(hotkey)
                if validator is None:
                    return
                if not (self._generators.ready.is_set() or self._submitter.keeps_for(hotkey)):
                    continue
                sent = self._now()
                response = await self._pull(validator)
                self._mark_asked(hotkey)
                if response is None:
                    place.leave()
                    if self._has_moved(validator):
                        continue
                    await self._back_off(hotkey, min(FIRST_RETRY_S * 2**failures, MAX_RETRY_S))
                    failures = min(failures + 1, 10)
                elif response.task is None:
                    pause = min(FIRST_REFUSAL_PAUSE_S * 2**refusals, MAX_RETRY_S)
                    failures, refusals = 0, min(refusals + 1, 10)
                    ask_again_at = self._refused(validator, response, sent, pause)
                else:
                    failures = refusals = 0
                    seconds = self._now() - sent
                    self._record(Pull(validator, "task", seconds, response.task.id, None, response.cooldown_violations))
                    ask_again_at = await self._work_on(validator, response, place, sent)
            finally:
                place.leave()

    async def _admitted(self, hotkey: str) -> Place:
        """Waits for room for another task; without waiting if a kept result needs this pull."""
        if self._submitter.keeps_for(hotkey):
            return self._admission.enter_at_once()
        await self._generators.ready.wait()
        if self._admission.is_full:
            self._mark_asked(hotkey)
        return await self._admission.enter()

    async def _pull(self, validator: Neuron) -> PullTask | None:
        sent = self._now()
        response = await self._dendrite.call(
            validator.axon_info(), PullTask(), timeout=PULL_TIMEOUT_S, deserialize=False
        )
        if response.is_success:
            self._submitter.pulled(validator, response)
            return response
        log.warning("Pull from validator [%d] failed: %s", validator.uid, status_of(response))
        self._record(Pull(validator, "failed", self._now() - sent, reason=status_of(response)))
        return None

    def _refused(self, validator: Neuron, response: PullTask, sent: float, pause: float) -> float:
        """Handles an answer without a task. Returns the unix time from which the validator may be asked again."""
        now = self._now()
        cooldown_until, violations = response.cooldown_until, response.cooldown_violations
        if self._is_stranger_to(validator.hotkey, cooldown_until, violations):
            ask_again_at = now + UNREGISTERED_RETRY_S
        else:
            self._clocks.refused(validator.hotkey, cooldown_until, sent)
            ask_again_at = max(self._clocks.next_pull_at(validator.hotkey, cooldown_until), now + pause)
        log.info(
            "Validator [%d] gave no task: asked again in %.0f s, %d cooldown violations so far",
            validator.uid,
            ask_again_at - now,
            violations,
        )
        outcome: PullOutcome = "cooldown" if cooldown_until > 0 else "refused"
        self._record(Pull(validator, outcome, now - sent, ask_again_at=ask_again_at, violations=violations))
        return ask_again_at

    def _is_stranger_to(self, hotkey: str, cooldown_until: int, violations: int) -> bool:
        """Whether the validator does not know this miner as registered."""
        least, most = UNREGISTERED_S
        return violations == 0 and least < self._clocks.ahead(hotkey, cooldown_until) < most

    async def _work_on(self, validator: Neuron, response: PullTask, place: Place, sent: float) -> float:
        """Has a pulled task worked on. Returns the unix time from which the validator may be asked again."""
        task = response.task
        assert task is not None
        shown = quoted(task.prompt) if task.type == "text" else f"image, {len(task.prompt)} characters"
        log.info("Task pulled from validator [%d]: %s, %s", validator.uid, quoted(task.id), shown)
        threshold = usable_threshold(response.validation_threshold, self._threshold)
        # The validator counts from when it gave the task first.
        before, at = self._given.get(validator.hotkey, ("", sent))
        self._given[validator.hotkey] = task.id, at if before == task.id else sent
        free = min(max(response.throttle_period, 0), MAX_THROTTLE_S)
        free_until = self._given[validator.hotkey][1] + free
        assignment = Assignment(validator, task, threshold, self._now(), free_until)
        kept = await self._submitter.kept_result(validator, task)
        if kept is not None:
            place.leave()
            log.info("Validator [%d] still waits for %s: it is handed in again", validator.uid, quoted(task.id))
            self._submitter.submit(assignment, kept, kept=True)
            return await assignment.settled
        self._places[assignment] = place
        try:
            self._queue.put_nowait(assignment)
            return self._phases.apart(assignment, await assignment.settled)
        finally:
            del self._places[assignment]

    async def _sleep_until(self, hotkey: str, ask_again_at: float) -> None:
        """Waits until the validator may be asked and is worth it, which is checked every RECONSIDER_S."""
        skipped = False
        try:
            while True:
                now = self._now()
                worth_asking_at = 0.0 if self._submitter.keeps_for(hotkey) else self._worth_asking_at(hotkey)
                at = self.cooldowns[hotkey] = max(ask_again_at, worth_asking_at)
                if at <= now:
                    return
                self._mark_asked(hotkey)
                validator = self._directory.eligible.get(hotkey)
                if at > ask_again_at and not skipped and validator is not None:
                    skipped = True
                    log.info("Validator [%d] skipped: it earns too little; tried in %.0f s", validator.uid, at - now)
                await asyncio.sleep(min(at - now, RECONSIDER_S))
        finally:
            self.cooldowns.pop(hotkey, None)

    def _has_moved(self, validator: Neuron) -> bool:
        now = self._directory.eligible.get(validator.hotkey, validator)
        return (now.ip, now.port) != (validator.ip, validator.port)

    async def _back_off(self, hotkey: str, seconds: float) -> None:
        """Waits, with jitter, unless the validator moves to another address meanwhile."""
        moved = self._backing_off[hotkey] = asyncio.Event()
        try:
            async with asyncio.timeout(seconds * random.uniform(0.8, 1.2)):
                await moved.wait()
        except TimeoutError:
            pass
        finally:
            del self._backing_off[hotkey]

    def _mark_asked(self, hotkey: str) -> None:
        self._asked.add(hotkey)
        if self._asked >= self._directory.eligible.keys():
            self.first_round_done.set()
