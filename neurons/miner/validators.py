"""Which neurons of the metagraph the miner asks for tasks, and why it leaves out the others."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Container
from dataclasses import dataclass

from neurons.chain import PUBLIC_NETWORKS, Metagraph, Neuron

MIN_STAKE = 1000.0

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
        if not neuron.validator_permit:
            return "no validator permit"
        if not neuron.stake >= MIN_STAKE:
            return f"stake {neuron.stake:.1f} under {MIN_STAKE:.0f}"
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
        # Anyone can announce 127.0.0.1 or an address of the miner's own network on a public chain.
        if self.network in PUBLIC_NETWORKS and not address.is_global:
            return f"axon address {address} is not public"
        return None


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
        self._metagraph = metagraph
        eligible = {}
        reasons = {}
        for neuron in metagraph.neurons:
            reason = self._eligibility.reason_to_skip(neuron)
            if reason is None:
                eligible[neuron.hotkey] = neuron
            # The hundreds of neurons that are miners like this one are no news.
            elif neuron.validator_permit or reason.startswith("blacklisted"):
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
