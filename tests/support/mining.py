"""The assembled miner on a simulated subnet that tests can cut off, in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bittensor as bt

from neurons.miner.records.events import Event, Settlement, Submission
from neurons.miner.supervisor import keep_running
from neurons.miner.validators.blacklist import Blacklist
from neurons.miner.validators.dendrite import CONNECTION_LOST, NO_CONNECTION
from neurons.protocol import SubmitResults
from neurons.rehearsal.rules import Limits
from scripts.bench import virtual_time
from scripts.bench.simulated_subnet import (
    Behaviour,
    MemoryBooks,
    SimulatedNetwork,
    StandInService,
    options_in,
    simulated_miner,
)
from scripts.bench.virtual_time import now

HOUR = 3600.0


class Network(SimulatedNetwork):
    """`down`: no call gets through. `deaf`: calls arrive, answers do not."""

    def __init__(self, behaviours: Sequence[Behaviour], limits: Limits) -> None:
        super().__init__(behaviours, limits)
        self.down = self.deaf = False
        self.calls: list[tuple[str, int, float]] = []
        self.submitted: list[SubmitResults] = []

    async def call(self, target_axon: Any, synapse: Any, timeout: float, deserialize: bool) -> Any:  # noqa: ASYNC109
        self.calls.append((type(synapse).__name__, target_axon.port, now()))
        if isinstance(synapse, SubmitResults):
            self.submitted.append(synapse)
        status = NO_CONNECTION
        if not self.down:
            synapse = await super().call(target_axon, synapse, timeout, deserialize)
            status = CONNECTION_LOST
        if self.down or self.deaf:
            synapse.axon = bt.TerminalInfo()
            synapse.dendrite = bt.TerminalInfo(status_code=status)
        return synapse


class Books(MemoryBooks):
    breaks: type[Event] | None = None  # breaks whoever records the next one of these

    def record(self, event: Event) -> None:
        if self.breaks is not None and isinstance(event, self.breaks):
            self.breaks = None
            raise RuntimeError("broken on purpose")
        super().record(event)


class Miner:
    """The assembled parts, with what tests look at and change."""

    def __init__(self, network: Network, folder: Path, services: Sequence[Any], **options: Any) -> None:
        self.network = network
        self.books = Books()
        self.events = self.books.events
        self.blacklist_file = folder / "blacklist"
        self.blacklist = Blacklist((), self.blacklist_file)
        self._options = replace(options_in(folder), spool=folder, **options)
        self._services = services
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        parts = await simulated_miner(self._options, self.network, self._services, self.books, self.blacklist)
        self.directory, self.pool, self.manager, self.clocks = parts.directory, parts.pool, parts.manager, parts.clocks
        running = [self.pool.watch, *(worker.run for worker in parts.workers)]
        self.tasks = [asyncio.create_task(keep_running("A part", part)) for part in running]

    async def kill(self) -> None:
        """As far as one process can: everything stops where it stands."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def count(self, kind: type[Event], outcome: str) -> int:
        return sum(isinstance(event, kind) and event.outcome == outcome for event in self.events)

    def outcomes(self) -> Counter[str]:
        """What the miner believes of its results, each counted once."""
        believed: dict[str, str] = {}
        for event in self.events:
            if isinstance(event, Submission):
                assert event.task_id not in believed
                believed[event.task_id] = event.outcome
            elif isinstance(event, Settlement):
                assert believed[event.task_id] == "unknown"
                believed[event.task_id] = event.outcome
        return Counter(believed.values())


@asynccontextmanager
async def mining(network: Network, folder: Path, *services: Any, **options: Any):  # type: ignore[no-untyped-def]
    miner = Miner(network, folder, services or [StandInService(20.0, 4)], **options)
    await miner.start()
    try:
        yield miner
    finally:
        await miner.kill()


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    virtual_time.run(test())


def limits(cooldown: float = 300.0, throttle: float = 30.0) -> Limits:
    return replace(Limits(), task_cooldown=cooldown, throttle_period=throttle)


def violations(network: SimulatedNetwork) -> int:
    return sum(validator.violations for validator in network.validators)
