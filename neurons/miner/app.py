"""The miner process: its hotkey, and its parts from start to stop."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import bittensor as bt

from common.log_lines import shown_network
from neurons import chain
from neurons.chain import Metagraph
from neurons.defaults import REHEARSAL
from neurons.miner import keys, stopping
from neurons.miner.assemble import Miner, assemble, open_books
from neurons.miner.generation.service import GenerationService
from neurons.miner.options import MinerOptions
from neurons.miner.records.bookkeeping import Bookkeeping
from neurons.miner.status import ClockLog, IdleLog, StatusFile, snapshot
from neurons.miner.submission.spool import SpoolUnusable, hold
from neurons.miner.supervisor import keep_running
from neurons.miner.validators.blacklist import Blacklist, BlacklistUnreadable
from neurons.miner.validators.dendrite import ValidatorDendrite

STATUS_INTERVAL_S = 1.0

log = logging.getLogger(__name__)


class CompetitiveMiner:
    """Runs until `stop` is called. While it is not registered, or has no service or network, it logs that and waits."""

    def __init__(self, options: MinerOptions) -> None:
        self._options = options
        self._stopping = asyncio.Event()
        self._status = StatusFile(options.status_file, shown_network(options.network))

    def stop(self) -> None:
        """Ends `run`, within stopping.TOTAL_S seconds. May be called more than once."""
        if not self._stopping.is_set():
            log.info("Stopping")
        self._stopping.set()

    async def run(self) -> int:
        """Runs the miner. Returns the exit status: 0 after `stop`, 1 if it cannot start, as a log line explains."""
        options = self._options
        try:
            blacklist = Blacklist(options.blacklist, options.blacklist_file)
            blacklist.load()
            if await self._network_is_there():
                keypair = keys.load(options.wallet_name, options.wallet_hotkey, options.wallet_path)
                with hold(options.spool_of(keypair.ss58_address)):
                    await self._mine(keypair, blacklist)
        except (BlacklistUnreadable, keys.KeyUnusable, SpoolUnusable) as error:
            log.critical("%s", error)
            return 1
        finally:
            self._status.remove()
        log.info("Stopped")
        return 0

    async def _mine(self, keypair: bt.Keypair, blacklist: Blacklist) -> None:
        options = self._options
        ledger, folder = options.ledger_of(keypair.ss58_address), options.spool_of(keypair.ss58_address)
        log.info("Miner %s on %s, subnet %d", keypair.ss58_address, shown_network(options.network), options.netuid)
        log.info("Ledger %s, spool %s", ledger, folder)
        if options.network == REHEARSAL:
            log.warning("REHEARSAL: validators on this machine; nothing is submitted to the Bittensor network")
        async with AsyncExitStack() as stack:
            dendrite = await stack.enter_async_context(ValidatorDendrite(keypair))
            services = [await stack.enter_async_context(GenerationService(url)) for url in options.endpoints]
            books = open_books(options, keypair.ss58_address)
            miner = await assemble(
                options,
                keypair,
                dendrite=dendrite,
                services=services,
                fetch=self._fetch,
                blacklist=blacklist,
                books=books,
            )
            await self.mine(miner, books)

    async def mine(self, miner: Miner, books: Bookkeeping) -> None:
        """Runs the parts until `stop`, then finishes and submits what there is time for."""
        books.start()
        try:
            workers = [_start(f"Worker {number}", worker.run) for number, worker in enumerate(miner.workers, start=1)]
            background = [
                _start("Watching the generation services", miner.pool.watch),
                _start("Following the chain", miner.synchroniser.follow_chain),
                _start("Following the blacklist", miner.synchroniser.follow_blacklist),
                _start("Following the standings", books.follow_standings),
                _start("The status report", functools.partial(self._report_status, miner, books)),
            ]
            await self._stopping.wait()

            now = miner.clocks.now
            stopped_at = now()
            miner.pool.stop_waiting()
            for task in background:
                task.cancel()
            await miner.manager.close()
            _, late = await asyncio.wait(workers, timeout=stopping.WORKERS_S)
            for task in late:
                task.cancel()
            if late:
                log.warning("%d tasks left in generation; their validators keep them assigned", len(late))
            await asyncio.gather(*background, *late, return_exceptions=True)
            left = stopped_at + stopping.TASKS_S - now()
            await miner.submitter.drain(min(stopping.SUBMISSIONS_S, left))
        finally:
            await books.close()

    async def _network_is_there(self) -> bool:
        """Waits for the rehearsal to write the network's file, its last step. False when stopped meanwhile."""
        file = _network_file(self._options)
        if self._options.network != REHEARSAL or file.exists():
            return True
        log.warning("No available validators: waiting for the rehearsal to write %s", file)
        self._status.write(status="waiting for the rehearsal", validators=0)
        while not file.exists():
            try:
                async with asyncio.timeout(STATUS_INTERVAL_S):
                    await self._stopping.wait()
                return False
            except TimeoutError:
                pass
        return True

    async def _fetch(self) -> Metagraph:
        options = self._options
        if options.network == REHEARSAL:
            return await asyncio.to_thread(chain.load, _network_file(options))
        return await chain.fetch(options.network, options.netuid)

    async def _report_status(self, miner: Miner, books: Bookkeeping) -> None:
        """Keeps the status file up to date, and logs when there is nothing to do."""
        idle_log, clock_log = IdleLog(miner.clocks.now), ClockLog()
        manager, pool = miner.manager, miner.pool
        while True:
            eligible = miner.directory.eligible
            if not eligible:
                status = miner.synchroniser.problem
            elif manager.first_round_done.is_set():
                status = "ready"
            else:
                status = "asking validators" if pool.ready.is_set() else "waiting for the generation service"
            self._status.write(
                status=status,
                validators=len(eligible),
                queued=manager.queued,
                working=len(manager.working),
                totals=dict(books.totals),
            )
            idle_log.update(manager, len(eligible))
            registered = miner.synchroniser.registered
            moment = snapshot(miner.directory, manager, pool, miner.clocks, books.backlog, status, registered)
            clock_log.update(moment.clock_behind)
            books.show(moment)
            await asyncio.sleep(STATUS_INTERVAL_S)


def _start(name: str, part: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    return asyncio.create_task(keep_running(name, part))


def _network_file(options: MinerOptions) -> Path:
    return options.rehearsal_state / "network.json"
