"""Who is on the subnet: one `Metagraph` of plain values, from the chain or from a rehearsal's file.

The file is JSON: {"netuid": int, "neurons": [{"uid", "hotkey", "ip", "port", "stake", "serving"}]}.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import math
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bittensor as bt

from common.log_lines import shown_network, without_keys

FETCH_TIMEOUT_S = 60.0
# Seconds on top of it: the chain's client may ignore the cancellation at its time-out, and then its thread never ends.
GIVE_UP_S = 30.0
NO_ANSWER = "Is there a connection to the internet? --network wss://... asks another node"
MAX_NETWORK_FILE_BYTES = 1 << 20


class MetagraphUnavailable(Exception):
    """The metagraph could not be read; the message says from where and why."""


@dataclass(frozen=True)
class Neuron:
    """A registered neuron. `stake` is in the subnet's own unit; `serving` says that it announces an axon.
    `incentive` is its share of what the subnet's miners earn, in 0..1 (None where no chain tells it).
    """

    uid: int
    hotkey: str
    ip: str
    port: int
    stake: float
    serving: bool
    incentive: float | None = None

    def axon_info(self) -> bt.AxonInfo:
        """As bittensor describes an axon. Raises ValueError where `ip` is no address."""
        version = ipaddress.ip_address(self.ip).version
        return bt.AxonInfo(version=0, ip=self.ip, port=self.port, ip_type=version, hotkey=self.hotkey, coldkey="")


@dataclass(frozen=True)
class Metagraph:
    """The neurons of subnet `netuid`."""

    netuid: int
    neurons: tuple[Neuron, ...]

    def find(self, hotkey: str) -> Neuron | None:
        """The neuron with this hotkey; None when it is not registered."""
        return next((neuron for neuron in self.neurons if neuron.hotkey == hotkey), None)


async def fetch(network: str, netuid: int) -> Metagraph:
    """The metagraph of `netuid` from the chain at `network` (finney, test, or a ws:// or wss:// address).

    In a thread with an event loop of its own: decoding a metagraph is work that nobody else should wait for. The thread
    is left behind when the caller is cancelled, or when it does not end. Raises MetagraphUnavailable.
    """
    loop = asyncio.get_running_loop()
    fetched: asyncio.Future[Metagraph] = loop.create_future()

    def deliver(result: Metagraph | BaseException) -> None:
        if fetched.cancelled():
            return
        if isinstance(result, Metagraph):
            fetched.set_result(result)
        else:
            fetched.set_exception(result)

    def work() -> None:
        result: Metagraph | BaseException
        try:
            result = asyncio.run(_fetch(network, netuid))
        except BaseException as error:
            result = error
        # Closed when the miner has stopped meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, result)

    threading.Thread(target=work, name="metagraph", daemon=True).start()
    limit = FETCH_TIMEOUT_S + GIVE_UP_S
    try:
        async with asyncio.timeout(limit):
            return await fetched
    except TimeoutError as error:
        said = f"{shown_network(network)}: reading subnet {netuid} has not ended in {limit:.0f} s. {NO_ANSWER}"
        raise MetagraphUnavailable(said) from error


async def _fetch(network: str, netuid: int) -> Metagraph:
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S), bt.AsyncSubtensor(network=network) as subtensor:
            return from_chain(await subtensor.metagraph(netuid, lite=True))
    except TimeoutError as error:
        said = f"{shown_network(network)}: no answer about subnet {netuid} in {FETCH_TIMEOUT_S:.0f} s. {NO_ANSWER}"
        raise MetagraphUnavailable(said) from error
    except Exception as error:
        # The substrate client lets whatever its websocket and decoder raise through.
        said = f"{shown_network(network)}: {type(error).__name__} {without_keys(str(error))}".rstrip()
        raise MetagraphUnavailable(said) from error


def from_chain(metagraph: Any) -> Metagraph:
    """Plain values of a bittensor metagraph."""
    neurons = zip(metagraph.uids, metagraph.hotkeys, metagraph.axons, metagraph.S, strict=True)
    # Only shown: whatever is there of it, mining goes on.
    incentives = dict(zip(map(int, metagraph.uids), map(float, metagraph.I), strict=False))
    return Metagraph(
        netuid=int(metagraph.netuid),
        neurons=tuple(
            Neuron(
                uid=int(uid),
                hotkey=str(hotkey),
                ip=str(axon.ip),
                port=int(axon.port),
                stake=float(stake),
                serving=bool(axon.is_serving),
                incentive=incentive if math.isfinite(incentive := incentives.get(int(uid), math.nan)) else None,
            )
            for uid, hotkey, axon, stake in neurons
        ),
    )


def load(path: Path) -> Metagraph:
    """The metagraph in a rehearsal's network file. Raises MetagraphUnavailable."""
    try:
        if path.stat().st_size > MAX_NETWORK_FILE_BYTES:
            raise ValueError(f"larger than {MAX_NETWORK_FILE_BYTES} bytes")
        content = json.loads(path.read_text())
        return Metagraph(int(content["netuid"]), tuple(Neuron(**neuron) for neuron in content["neurons"]))
    except FileNotFoundError as error:
        raise MetagraphUnavailable(f"{path}: not there (is the rehearsal running?)") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MetagraphUnavailable(f"{path}: {type(error).__name__}: {error}") from error


def save(metagraph: Metagraph, path: Path) -> None:
    """Writes the file that `load` reads, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(metagraph), indent=2) + "\n")
    temporary.replace(path)
