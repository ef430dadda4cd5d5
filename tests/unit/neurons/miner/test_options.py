"""The miner's settings from a file: as from flags, which override it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from neurons.miner.options import COMMAND_LINE, parse

FILE = """
[network]
netuid = 18
[wallet]
name = "cold"
hotkey = "hot"
path = "keys"
[score]
validation_threshold = 0.7
[service]
port = "what the service makes of it is not the miner's business"
[miner]
endpoints = ["http://10.0.0.2:10006", "http://10.0.0.3:10006"]
blacklist = [180, 7, "5Grwva"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "competitive.toml"
    path.write_text(FILE.replace("5Grwva", "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"))
    return path


def test_a_wallet_in_the_file_means_mining_for_real(file: Path) -> None:
    options = parse(["--config-file", str(file)])
    assert (options.network, options.netuid, options.wallet_name, options.wallet_hotkey) == (
        "finney",
        18,
        "cold",
        "hot",
    )
    assert options.wallet_path == file.parent / "keys"
    assert options.validation_threshold == 0.7
    assert options.endpoints == ("http://10.0.0.2:10006", "http://10.0.0.3:10006")
    assert tuple(options.blacklist)[:2] == (180, 7)
    assert len(options.blacklist) == 3
    assert parse([]).network == "rehearsal"


def test_flags_override_it(file: Path) -> None:
    argv = [
        "--config-file",
        str(file),
        "--generation.endpoint",
        "http://127.0.0.1:1",
        "--network",
        "test",
        "--netuid",
        "17",
    ]
    options = parse(argv)
    assert (options.endpoints, options.network, options.netuid) == (("http://127.0.0.1:1",), "test", 17)


def test_a_variable_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPETITIVE_WALLET_NAME", "cold")
    monkeypatch.setenv("COMPETITIVE_MINER_BLACKLIST", "180,7")
    options = parse([])
    assert (options.network, options.wallet_name, options.blacklist) == ("finney", "cold", (180, 7))


def test_what_may_hold_a_password_is_handed_on_by_variables() -> None:
    given = COMMAND_LINE.parse(["--subtensor.network", "ws://node/key", "--generation.endpoint", "http://a:b@c"])
    assert given["network"].name == "ws://node/key"
    assert given.flags("network", "miner") == []
    assert given.variable_of("network", "name") == "COMPETITIVE_NETWORK_NAME"


def test_save_is_for_the_next_start(tmp_path: Path) -> None:
    file = tmp_path / "competitive.toml"
    argv = ["--config-file", str(file), "--save", "--wallet.name", "cold", "--blacklist", "180", "7"]
    assert parse(argv) == parse(["--config-file", str(file)])
    assert tomllib.loads(file.read_text()) == {"wallet": {"name": "cold"}, "miner": {"blacklist": [180, 7]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[network]\nname = "mainnet"', "[network] name: 'mainnet' is none of auto, rehearsal, finney, test, ws://..."),
        ('[network]\nname = "https://node/key"', "[network] name: is none of auto, "),
        ("[miner]\nblacklist = [true]", "[miner] blacklist = [true]: must be UIDs and hotkeys"),
        (
            "[miner]\nblacklist = [65536]",
            "[miner] blacklist = [65536]: '65536' is neither a UID (0 to 65535) nor a hotkey",
        ),
        ('[miner]\nendpoints = ["http://u:secret@"]', "[miner] endpoints: is no address: "),
        ("[miner]\nmin_reward = 2", "[miner] min_reward = 2: must be a number in 0..1"),
        ('[wallet]\nmnemonic = "abandon abandon"', "[wallet] mnemonic: no such setting: there are name, hotkey, path"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str) -> None:
    file = tmp_path / "competitive.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        parse(["--config-file", str(file)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    assert f"serve_miner_competitive: {file}: {said}" in error
    assert "secret" not in error
    assert "node" not in error
    assert "abandon" not in error
