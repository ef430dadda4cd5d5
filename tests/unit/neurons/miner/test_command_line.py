"""The miner's command line."""

from __future__ import annotations

from pathlib import Path

import bittensor as bt
import pytest

from neurons.miner import options


def test_networks_and_wallets() -> None:
    rehearsal = options.parse([])
    assert (rehearsal.network, rehearsal.wallet_name, rehearsal.wallet_hotkey) == ("rehearsal", "rehearsal", "miner")
    assert rehearsal.wallet_path == Path("data/rehearsal/wallets")
    real = options.parse(["--wallet.name", "w", "--wallet.hotkey", "h", "--wallet.path", "/k"])
    assert (real.network, real.wallet_name, real.wallet_hotkey, str(real.wallet_path)) == ("finney", "w", "h", "/k")
    assert (real.blacklist, real.netuid, real.workers) == ((180,), 17, 4)
    practice = options.parse(["--wallet.name", "w", "--network", "rehearsal"])
    assert practice.wallet_name == "rehearsal"  # the real one stays out of it
    assert options.parse(["--subtensor.network", "ws://127.0.0.1:9944"]).network == "ws://127.0.0.1:9944"
    hotkey = bt.Keypair.create_from_uri("//miner").ss58_address
    assert options.parse(["--blacklist", "180", "7", hotkey]).blacklist == (180, 7, hotkey)
    urls = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
    assert options.parse(["--generation.endpoint", *urls]).endpoints == tuple(urls)
    repeated = [word for url in (*urls, urls[0]) for word in ("--generation.endpoint", url)]
    assert options.parse(repeated).endpoints == tuple(urls)
    assert options.parse([]).endpoints == ("http://127.0.0.1:10006",)


@pytest.mark.parametrize(
    "argv",
    [
        ["--network", "mainnet"],
        ["--workers", "0"],
        ["--validation-threshold", "1.5"],
        ["--validation-threshold", "nan"],
        ["--blacklist", "x"],
        ["--retries", "-1"],
        ["--generation.endpoint", "file:///etc/passwd"],
        ["--generation.endpoint", "http://10.0.0.2:1000g"],
        ["--generation.endpoint", "http://:10006"],
        ["--generation.endpoint", "http://[10006"],
        ["--work", "4"],
    ],
)
def test_bad_arguments_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        options.parse(argv)
    assert stop.value.code == 2
