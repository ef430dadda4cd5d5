"""Which neurons of the metagraph the miner asks for tasks, and why it leaves out the others."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Container
from dataclasses import dataclass

from neurons.chain import Metagraph, Neuron
from neurons.defaults import REHEARSAL

MIN_STAKE = 1000.0
_UNICAST = ipaddress.ip_network("2000::/3")
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Eligibility:
    """The rule by which validators are chosen. `blacklist` has UIDs and hotkeys."""

    own_hotkey: str
    network: str
    blacklist: Container[int | str]

    def reason_to_skip(self, neuron: Neuron) -> str | None:
        """Why `neuron` is not asked for tasks; None when it is."""
        if neuron.hotkey == self.own_hotkey:
            return "this miner itself"
        if neuron.uid in self.blacklist:
            return "blacklisted UID"
        if neuron.hotkey in self.blacklist:
            return "blacklisted hotkey"
        if not neuron.stake >= MIN_STAKE:
            return f"stake under {MIN_STAKE:.0f}"
        if not neuron.serving:
            return "axon not serving"
        return self._reason_to_mistrust_address(neuron)

    def _reason_to_mistrust_address(self, neuron: Neuron) -> str | None:
        try:
            address = ipaddress.ip_address(neuron.ip)
        except ValueError:
            return "axon address is no IP address"
        if not 0 < neuron.port < 65536:
            return f"axon port {neuron.port} out of range"
        # On a chain anyone can announce 127.0.0.1 or an address of the miner's own network. A node on this machine does
        # not make the chain a private one.
        if self.network != REHEARSAL and not _is_public(address):
            return f"axon address {address} is not public"
        return None


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether this is one host out in the internet. `is_global` alone also holds for groups and for detours."""
    if address.version == 4:
        return address.is_global and not address.is_multicast
    # Outside of 2000::/3 and in 2002::/16 are addresses that stand for IPv4 ones, 127.0.0.1 among them.
    return address.is_global and address in _UNICAST and address not in _SIX_TO_FOUR


class ValidatorDirectory:
    """The eligible validators of the latest metagraph, by hotkey. Says in the log who is skipped, once per reason."""

    def __init__(self, eligibility: Eligibility) -> None:
        self._eligibility = eligibility
        self._logged: dict[str, str] = {}
        self._metagraph = Metagraph(0, ())
        self.eligible: dict[str, Neuron] = {}

    def refresh(self) -> None:
        """To be called when the blacklist has changed."""
        self.update(self._metagraph)

    def update(self, metagraph: Metagraph) -> None:
        """Takes a new metagraph."""
        self._metagraph = metagraph
        eligible = {}
        reasons = {}
        known = self.eligible.keys() | self._logged.keys()
        for neuron in metagraph.neurons:
            reason = self._eligibility.reason_to_skip(neuron)
            if reason is None:
                eligible[neuron.hotkey] = neuron
            # Hundreds of neurons are miners like this one: they are not worth a line.
            elif neuron.stake >= MIN_STAKE or reason.startswith("blacklisted") or neuron.hotkey in known:
                reasons[neuron.hotkey] = reason
                if self._logged.get(neuron.hotkey) != reason:
                    log.info("Validator [%d] skipped: %s", neuron.uid, reason)
        for neuron in eligible.values():
            before = self.eligible.get(neuron.hotkey)
            if before is None or (before.ip, before.port) != (neuron.ip, neuron.port):
                log.info("Validator [%d] at %s:%d, stake %.0f", neuron.uid, neuron.ip, neuron.port, neuron.stake)
        for hotkey in self.eligible.keys() - eligible.keys() - reasons.keys():
            log.info("Validator [%d] skipped: not on the subnet any more", self.eligible[hotkey].uid)
        self._logged = reasons
        self.eligible = eligible
