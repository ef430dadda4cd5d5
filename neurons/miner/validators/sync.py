"""Keeps the directory of validators up to date with the chain and the blacklist."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_result, wait_exponential

from neurons.chain import Metagraph, MetagraphUnavailable, Neuron
from neurons.miner.validators.blacklist import Blacklist
from neurons.miner.validators.directory import ValidatorDirectory

FIRST_RETRY_S = 2.0
BLACKLIST_INTERVAL_S = 2.0

log = logging.getLogger(__name__)


class Follower(Protocol):
    """Acts on changes of the directory: the task manager."""

    def sync(self) -> None:
        """Adapts to the directory."""


class Synchroniser:
    """Reads the chain and the blacklist's file regularly. `problem`: why the miner cannot mine now, or "".
    `registered`: the miner as the chain has it; None while it is not there.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[Metagraph]],
        hotkey: str,
        network: str,
        directory: ValidatorDirectory,
        manager: Follower,
        blacklist: Blacklist,
        interval: float,
    ) -> None:
        self._fetch = fetch
        self._hotkey = hotkey
        self._network = network
        self._directory = directory
        self._manager = manager
        self._blacklist = blacklist
        self._interval = interval
        self.problem = f"reading the metagraph of {network}"
        self.registered: Neuron | None = None

    async def follow_chain(self) -> None:
        """Reads the metagraph every `interval` seconds; sooner, with growing pauses, while that fails."""
        log.info("Reading the metagraph on %s", self._network)
        while True:
            retrying = AsyncRetrying(
                retry=retry_if_result(bool),
                wait=wait_exponential(FIRST_RETRY_S, max=self._interval),
                before_sleep=self._log_problem,
            )
            await retrying(self._sync)
            await asyncio.sleep(self._interval)

    def _log_problem(self, state: RetryCallState) -> None:
        log.error("%s; next attempt in %.0f s", self.problem, state.upcoming_sleep)

    async def follow_blacklist(self) -> None:
        """Applies changes of the blacklist's file."""
        while True:
            if await asyncio.to_thread(self._blacklist.reload):
                self._directory.refresh()
                self._manager.sync()
            await asyncio.sleep(BLACKLIST_INTERVAL_S)

    async def _sync(self) -> str:
        self.problem = await self._problem()
        return self.problem

    async def _problem(self) -> str:
        """Why the miner cannot mine, or "". While the chain cannot be reached, the last metagraph stays in force."""
        try:
            metagraph = await self._fetch()
        except MetagraphUnavailable as error:
            return f"No metagraph: {error}"
        problem = ""
        own = metagraph.find(self._hotkey)
        if own is not None:
            self._tell_registered(own, metagraph.netuid)
        else:
            problem = f"Not registered: hotkey {self._hotkey} is not on subnet {metagraph.netuid} of {self._network}"
            metagraph = Metagraph(metagraph.netuid, ())
        self.registered = own
        self._directory.update(metagraph)
        self._manager.sync()
        if not problem and not self._directory.eligible:
            problem = "No available validators: none of the subnet's neurons is eligible"
        return problem

    def _tell_registered(self, own: Neuron, netuid: int) -> None:
        """Says in the log what the chain has of this miner, when that changed."""
        before = self.registered
        if before is not None and (before.uid, before.incentive) == (own.uid, own.incentive):
            return
        share = "" if own.incentive is None else f", incentive {own.incentive:.5f} (its share of what all miners earn)"
        log.info("Registered on subnet %d as UID %d%s", netuid, own.uid, share)
