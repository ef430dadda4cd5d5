"""neurons.chain and neurons.miner.validators.directory: one metagraph shape, and who is eligible on it."""

from __future__ import annotations

import io
import ipaddress
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bittensor as bt
import pytest

from common.log_lines import SingleLineFormatter
from neurons import chain
from neurons.chain import Metagraph, MetagraphUnavailable, Neuron
from neurons.miner.validators.directory import Eligibility, ValidatorDirectory

VALIDATOR = Neuron(uid=5, hotkey="5V", ip="127.0.0.1", port=8091, stake=1000.0, serving=True)


def test_the_network_file_round_trips(tmp_path: Path) -> None:
    metagraph = Metagraph(17, (VALIDATOR, replace(VALIDATOR, uid=180, hotkey="5W")))
    chain.save(metagraph, tmp_path / "state" / "network.json")
    assert chain.load(tmp_path / "state" / "network.json") == metagraph
    assert metagraph.find("5W") == metagraph.neurons[1]
    assert metagraph.find("5X") is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"netuid": 17, "neurons": [{"uid": 1}]}', '{"netuid": 17, "neurons": 3}', "x" * 2_000_000],
)
def test_a_damaged_network_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "network.json"
    path.write_text(content)
    with pytest.raises(MetagraphUnavailable, match=r"network\.json"):
        chain.load(path)


def test_a_missing_network_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MetagraphUnavailable, match="is the rehearsal running"):
        chain.load(tmp_path / "network.json")


def test_plain_values_of_the_chain_s_metagraph() -> None:
    def axon(ip: str) -> bt.AxonInfo:
        return bt.AxonInfo(version=1, ip=ip, port=8091, ip_type=4, hotkey="", coldkey="")

    metagraph = chain.from_chain(
        SimpleNamespace(
            netuid=17,
            uids=[0, 1, 2, 3],
            hotkeys=["5A", "5B", "5C", "5D"],
            axons=[axon("203.0.113.9"), axon("0.0.0.0"), axon("0.0.0.0"), axon("0.0.0.0")],
            S=[12_000.5, 0.0, 0.0, 0.0],
            I=[0.0, 0.125, float("nan")],
            # Which say nothing of who hands out tasks.
            validator_permit=[False, True],
        )
    )
    assert metagraph.neurons == (
        Neuron(0, "5A", "203.0.113.9", 8091, 12_000.5, serving=True, incentive=0.0),
        Neuron(1, "5B", "0.0.0.0", 8091, 0.0, serving=False, incentive=0.125),
        Neuron(2, "5C", "0.0.0.0", 8091, 0.0, serving=False, incentive=None),
        Neuron(3, "5D", "0.0.0.0", 8091, 0.0, serving=False, incentive=None),
    )
    json.dumps([vars(neuron) for neuron in metagraph.neurons])  # plain, all of it


async def test_an_unreachable_chain_is_named() -> None:
    with pytest.raises(MetagraphUnavailable, match=r"ws://127\.0\.0\.1:9"):
        await chain.fetch("ws://127.0.0.1:9", 17)


async def test_bittensor_logs_no_key_of_an_unreachable_node() -> None:
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    handler.setFormatter(SingleLineFormatter("%(message)s"))
    bittensor = logging.getLogger("bittensor")
    bittensor.addHandler(handler)
    try:
        with pytest.raises(MetagraphUnavailable):
            await chain.fetch("ws://user:SECRET@127.0.0.1:9/v1?key=SECRET", 17)
    finally:
        bittensor.removeHandler(handler)
    assert "ws://127.0.0.1:9" in logged.getvalue()
    assert "SECRET" not in logged.getvalue()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"uid": 180}, "blacklisted UID"),
        ({"hotkey": "5M"}, "this miner itself"),
        ({"stake": 999.9}, "stake under 1000"),
        ({"stake": float("nan")}, "stake under 1000"),
        ({"serving": False}, "axon not serving"),
        ({"ip": "example.org"}, "axon address is no IP address"),
        ({"port": 0}, "axon port 0 out of range"),
    ],
)
def test_reasons_to_skip(change: dict[str, object], reason: str | None) -> None:
    eligibility = Eligibility("5M", "rehearsal", frozenset({180}))
    assert eligibility.reason_to_skip(replace(VALIDATOR, **change)) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize("network", ["finney", "test", "ws://127.0.0.1:9944", "wss://node.example:443"])
@pytest.mark.parametrize(
    ("ip", "public"),
    [
        *((ip, True) for ip in ("8.8.8.8", "2001:4860:4860::8888")),
        *((ip, False) for ip in ("127.0.0.1", "0.0.0.0", "10.1.2.3", "192.168.1.1", "169.254.169.254", "100.64.0.1")),
        *((ip, False) for ip in ("224.0.1.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "ff0e::1")),
        # 127.0.0.1 by way of mapped, compatible, translated and tunnelled addresses.
        *((ip, False) for ip in ("::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1")),
    ],
)
def test_a_chain_can_not_send_the_miner_to_its_own_network(network: str, ip: str, public: bool) -> None:
    neuron = Neuron(1, "5V", ip, 8091, 1e4, True)
    reason = Eligibility("5M", network, frozenset()).reason_to_skip(neuron)
    assert reason == (None if public else f"axon address {ipaddress.ip_address(ip)} is not public")


def test_skips_are_logged_once_per_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neurons.miner.validators.directory")
    directory = ValidatorDirectory(Eligibility("5M", "rehearsal", frozenset({180})))
    blacklisted = replace(VALIDATOR, uid=180, hotkey="5W")
    rich = replace(VALIDATOR, uid=6, hotkey="5P", serving=False, stake=2000.0)
    miner = replace(VALIDATOR, uid=7, hotkey="5O", stake=0.0)
    for neuron in (rich, rich, replace(rich, serving=True)):
        directory.update(Metagraph(17, (VALIDATOR, blacklisted, neuron, miner)))
    assert list(directory.eligible) == ["5V", "5P"]
    for stake in (10.0, 10.2):
        directory.update(Metagraph(17, (VALIDATOR, blacklisted, replace(rich, serving=True, stake=stake), miner)))
    assert list(directory.eligible) == ["5V"]
    assert [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()] == [
        "Validator [180] skipped: blacklisted UID",
        "Validator [6] skipped: axon not serving",
        "Validator [6] skipped: stake under 1000",
    ]
