"""The miner process: who it is, who is on the network, and its parts from start to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import bittensor as bt

from neurons import chain
from neurons.chain import Metagraph, MetagraphUnavailable
from neurons.miner.assignment import Assignment
from neurons.miner.dendrite import ValidatorDendrite
from neurons.miner.generator import GenerationService
from neurons.miner.options import REHEARSAL, MinerOptions
from neurons.miner.spool import Spool
from neurons.miner.submitter import Submitter
from neurons.miner.task_manager import AsyncTaskManager
from neurons.miner.validators import Eligibility, ValidatorDirectory
from neurons.miner.workers import work

SYNC_INTERVAL_S = 300.0
REHEARSAL_SYNC_INTERVAL_S = 5.0
FIRST_SYNC_RETRY_S = 2.0
STATUS_INTERVAL_S = 1.0
IDLE_LOG_INTERVAL_S = 60.0
# Of the 30 s that a stop may take: first what the workers have in hand, then the submissions.
STOP_WORKERS_S = 15.0
STOP_SUBMISSIONS_S = 8.0

log = logging.getLogger(__name__)


class CompetitiveMiner:
    """Runs until `stop` is called. Being unregistered, without service or without network is logged and waited out."""

    def __init__(self, options: MinerOptions) -> None:
        self._options = options
        self._stopping = asyncio.Event()
        self._failed = False
        self._status = "starting"
        self._totals: Counter[str] = Counter()
        self._busy: set[Assignment] = set()

    def stop(self) -> None:
        if not self._stopping.is_set():
            log.info("Stopping")
        self._stopping.set()

    async def run(self) -> int:
        """The process' exit status: 0 after `stop`, 1 when a part of the miner broke."""
        try:
            keypair = await self._load_keypair()
            if keypair is not None:
                await self._mine(keypair)
        finally:
            if self._options.status_file is not None:
                self._options.status_file.unlink(missing_ok=True)
        log.info("Stopped")
        return int(self._failed)

    async def _mine(self, keypair: bt.Keypair) -> None:
        options = self._options
        log.info("Miner %s on %s, subnet %d", keypair.ss58_address, options.network, options.netuid)
        if options.network == REHEARSAL:
            log.warning("REHEARSAL: validators on this machine; nothing is submitted to the Bittensor network")
        async with AsyncExitStack() as stack:
            dendrite = await stack.enter_async_context(ValidatorDendrite(keypair))
            service = await stack.enter_async_context(GenerationService(options.endpoint))
            spool = Spool(options.spool)
            directory = ValidatorDirectory(Eligibility(keypair.ss58_address, options.network, options.blacklist))
            submitter = Submitter(dendrite, keypair, spool, self._totals)
            manager = AsyncTaskManager(
                dendrite,
                directory,
                submitter,
                spool,
                service.ready,
                self._totals,
                workers=options.workers,
                threshold=options.validation_threshold,
            )
            workers = [
                self._part(work(manager, service, submitter, self._totals, self._busy)) for _ in range(options.workers)
            ]
            background = [
                self._part(service.watch()),
                self._part(self._keep_in_sync(keypair.ss58_address, directory, manager)),
                self._part(self._report_status(directory, manager, service)),
            ]
            await self._stopping.wait()

            self._status = "stopping"
            service.stop_waiting()
            for task in background:
                task.cancel()
            await manager.close()
            _, late = await asyncio.wait(workers, timeout=STOP_WORKERS_S)
            for worker in late:
                worker.cancel()
            if late:
                log.warning("%d tasks left in generation; their validators keep them assigned", len(late))
            await asyncio.gather(*background, *late, return_exceptions=True)
            await submitter.drain(STOP_SUBMISSIONS_S)

    def _part(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task without which the miner can not go on: when it breaks, the miner stops in good order."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.critical("A part of the miner broke", exc_info=error)
                self._failed = True
                self._stopping.set()

        task = asyncio.create_task(coroutine)
        task.add_done_callback(ended)
        return task

    async def _load_keypair(self) -> bt.Keypair | None:
        """The miner's hotkey; None when there is none. A rehearsal makes the wallet first, so that is waited for."""
        options = self._options
        if options.network == REHEARSAL and not _network_file(options).exists():
            log.warning("No available validators: waiting for the rehearsal to write %s", _network_file(options))
            self._write_status(status="waiting for the rehearsal", validators=0)
            while not _network_file(options).exists():
                if await self._stopped_within(STATUS_INTERVAL_S):
                    return None
        try:
            return bt.Wallet(options.wallet_name, options.wallet_hotkey, str(options.wallet_path)).hotkey
        except bt.KeyFileError as error:
            log.critical("Wallet %r, hotkey %r: %s", options.wallet_name, options.wallet_hotkey, error)
            self._failed = True
            return None

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _keep_in_sync(self, hotkey: str, directory: ValidatorDirectory, manager: AsyncTaskManager) -> None:
        interval = REHEARSAL_SYNC_INTERVAL_S if self._options.network == REHEARSAL else SYNC_INTERVAL_S
        retry = FIRST_SYNC_RETRY_S
        self._status = f"reading the metagraph of {self._options.network}"
        log.info("Reading the metagraph of subnet %d on %s", self._options.netuid, self._options.network)
        while True:
            problem = await self._sync(hotkey, directory, manager)
            if problem is None:
                retry = FIRST_SYNC_RETRY_S
                await asyncio.sleep(interval)
            else:
                log.error("%s; next attempt in %.0f s", problem, retry)
                if not directory.eligible:
                    self._status = problem
                await asyncio.sleep(retry)
                retry = min(2 * retry, interval)

    async def _sync(self, hotkey: str, directory: ValidatorDirectory, manager: AsyncTaskManager) -> str | None:
        """Brings the directory up to date; what stands in the way, if anything does."""
        options = self._options
        try:
            if options.network == REHEARSAL:
                metagraph = await asyncio.to_thread(chain.load, _network_file(options))
            else:
                metagraph = await chain.fetch(options.network, options.netuid)
        except MetagraphUnavailable as error:
            return f"No metagraph: {error}"
        if metagraph.find(hotkey) is None:
            directory.update(Metagraph(metagraph.netuid, ()))
            return f"Not registered: hotkey {hotkey} is not on subnet {metagraph.netuid} of {options.network}"
        directory.update(metagraph)
        if not directory.eligible:
            return "No available validators: none of the subnet's neurons is eligible"
        manager.poll_eligible()
        return None

    async def _report_status(
        self, directory: ValidatorDirectory, manager: AsyncTaskManager, service: GenerationService
    ) -> None:
        """Keeps the status file as things are, and says in the log when there is nothing to do."""
        idle_logged = 0.0
        while True:
            if manager.first_round_done.is_set() and directory.eligible:
                self._status = "ready"
            elif directory.eligible:
                self._status = "asking validators" if service.ready.is_set() else "waiting for the generation service"
            self._write_status(
                status=self._status,
                validators=len(directory.eligible),
                queued=manager.queued,
                working=len(self._busy),
                totals=dict(self._totals),
            )
            asleep = len(manager.cooldowns)
            if asleep and asleep == len(directory.eligible) and time.monotonic() - idle_logged > IDLE_LOG_INTERVAL_S:
                idle_logged = time.monotonic()
                seconds = max(0.0, min(manager.cooldowns.values()) - time.time())
                log.info("No available validators: all %d on cooldown, the next one in %.0f s", asleep, seconds)
            await asyncio.sleep(STATUS_INTERVAL_S)

    def _write_status(self, **fields: Any) -> None:
        path = self._options.status_file
        if path is None:
            return
        content = {**fields, "network": self._options.network, "pid": os.getpid()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(path)
        except OSError as error:
            log.error("Status file %s: %s", path, error)


def _network_file(options: MinerOptions) -> Path:
    return options.rehearsal_state / "network.json"
