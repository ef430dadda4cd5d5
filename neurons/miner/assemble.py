"""The miner's parts, put together: the same way for production, benchmarks and tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import bittensor as bt

from common.log_lines import shown_network
from neurons.chain import Metagraph
from neurons.defaults import REHEARSAL
from neurons.miner.generation.pool import GeneratorPool, Service
from neurons.miner.options import MinerOptions
from neurons.miner.records.activity import Identity
from neurons.miner.records.bookkeeping import Bookkeeping
from neurons.miner.records.events import Event
from neurons.miner.records.verdicts import PastSubmission
from neurons.miner.submission.spool import Spool
from neurons.miner.submission.submitter import Submitter, ValidatorCaller
from neurons.miner.tasks.best_of import BestOf
from neurons.miner.tasks.phases import Phases
from neurons.miner.tasks.task_manager import AsyncTaskManager
from neurons.miner.tasks.workers import Worker
from neurons.miner.validators.blacklist import Blacklist
from neurons.miner.validators.clock import ValidatorClocks, steady_time
from neurons.miner.validators.dendrite import DateListener
from neurons.miner.validators.directory import Eligibility, ValidatorDirectory
from neurons.miner.validators.sync import Synchroniser

SYNC_INTERVAL_S = 300.0
REHEARSAL_SYNC_INTERVAL_S = 5.0


class Dendrite(ValidatorCaller, Protocol):
    """ValidatorDendrite, or a simulation of validators. `assemble` sets both attributes."""

    on_date: DateListener
    seconds_ahead: Callable[[str], float]


class Books(Protocol):
    """What the parts need of Bookkeeping."""

    def record(self, event: Event) -> None:
        """Records an event. Returns at once and never raises."""

    def worth_asking_at(self, hotkey: str) -> float:
        """The unix time from which a pull is worth its cost; 0 for right away."""

    async def cooldowns(self) -> Mapping[str, float]:
        """Hotkey -> unix time until which the validator may not be asked."""

    async def submissions(self) -> Sequence[PastSubmission]:
        """Submissions of an earlier run that validators may still count, oldest first."""


@dataclass(frozen=True)
class Miner:
    """The parts of one miner, not started yet."""

    clocks: ValidatorClocks
    directory: ValidatorDirectory
    pool: GeneratorPool
    spool: Spool
    submitter: Submitter
    manager: AsyncTaskManager
    workers: Sequence[Worker]
    synchroniser: Synchroniser


def open_books(options: MinerOptions, hotkey: str, now: Callable[[], float] = steady_time) -> Bookkeeping:
    """The books of the miner with this hotkey."""
    ledger, spool = options.ledger_of(hotkey), options.spool_of(hotkey)
    identity = Identity(hotkey, shown_network(options.network), options.netuid)
    return Bookkeeping(ledger, options.metrics_port, options.min_reward, now, spool, identity)


async def assemble(
    options: MinerOptions,
    keypair: bt.Keypair,
    *,
    dendrite: Dendrite,
    services: Sequence[Service],
    fetch: Callable[[], Awaitable[Metagraph]],
    blacklist: Blacklist,
    books: Books,
    now: Callable[[], float] = steady_time,
) -> Miner:
    """A miner that goes on where the last run ended, by `books` and the spool.

    `now`: unix seconds of a clock that never steps.
    """
    hotkey = keypair.ss58_address
    clocks = ValidatorClocks(now)
    dendrite.on_date, dendrite.seconds_ahead = clocks.answered, clocks.highest_offset
    directory = ValidatorDirectory(Eligibility(hotkey, options.network, blacklist))
    pool = GeneratorPool(services, now)
    spool = Spool(options.spool_of(hotkey))
    history = await books.submissions()
    submitter = Submitter(dendrite, directory, clocks, keypair, spool, books.record, history)
    best_of = BestOf(options.best_of, pool, options.workers, now)
    manager = AsyncTaskManager(
        dendrite,
        directory,
        clocks,
        submitter,
        pool,
        books.record,
        workers=options.workers,
        threshold=options.validation_threshold,
        cooldowns=await books.cooldowns(),
        worth_asking_at=books.worth_asking_at,
        phases=Phases(best_of.free_seconds),
    )
    workers = [
        Worker(manager, pool, submitter, books.record, best_of=best_of, retries=options.retries, now=now)
        for _ in range(options.workers)
    ]
    interval = REHEARSAL_SYNC_INTERVAL_S if options.network == REHEARSAL else SYNC_INTERVAL_S
    synchroniser = Synchroniser(fetch, hotkey, shown_network(options.network), directory, manager, blacklist, interval)
    return Miner(clocks, directory, pool, spool, submitter, manager, workers, synchroniser)
