"""The hotkey that the miner signs with: what can not sign is one line, and nothing of a key is ever shown."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import bittensor as bt
import pytest

from neurons.miner import keys
from neurons.miner.app import CompetitiveMiner
from neurons.miner.options import MinerOptions

SEED = "0x" + "5a" * 31 + "zz"
PHRASE = "bottom drive obey lake curtain smoke basket hold race lonely fit wrong"
# As bittensor writes the public half of a key beside a coldkey.
PUBLIC_HALF = {
    "accountId": "0xd88032ee6996db5464685740a1df8cf8987759054264c78dad7252965e6ec93d",
    "publicKey": "0xd88032ee6996db5464685740a1df8cf8987759054264c78dad7252965e6ec93d",
    "ss58Address": "5GxaHPGo9pQtpbmN5THq4V9SGWAMdz2JeAnDQ1n7GcVdaFt8",
}
# To bittensor a file that begins like this has a password.
ENCRYPTED = "$NACL" + "x" * 200


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "cold" / "hotkeys" / "hot"
    file.parent.mkdir(parents=True)
    return file


def test_a_key_that_signs(file: Path, tmp_path: Path) -> None:
    file.write_text(json.dumps({"secretSeed": "0x" + "5a" * 32}))
    keypair = keys.load("cold", "hot", tmp_path)
    assert keypair.verify(b"message", keypair.sign(b"message"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (json.dumps(PUBLIC_HALF), "holds a public key alone, which can not sign"),
        (json.dumps({"secretSeed": SEED}), "holds no key that can be read"),
        (json.dumps({"secretPhrase": PHRASE}), "holds no key that can be read"),
        (PHRASE, "holds no key that can be read"),
        ("", "holds no key that can be read"),
        ("[]", "holds no key that can be read"),
        (None, "can not be read: No such file or directory"),
    ],
)
def test_what_can_not_sign_is_one_line_without_what_the_file_holds(
    file: Path, tmp_path: Path, content: str | None, reason: str
) -> None:
    if content is not None:
        file.write_text(content)
    with pytest.raises(keys.KeyUnusable) as unusable:
        keys.load("cold", "hot", tmp_path)
    assert str(unusable.value) == f"Wallet 'cold', hotkey 'hot': {file} {reason}"


def test_a_key_with_a_password_asks_nobody(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file.write_text(ENCRYPTED)
    with pytest.raises(keys.KeyUnusable, match="hot has a password, and the miner asks nobody for it"):
        keys.load("cold", "hot", tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_password_in_bittensor_s_variable_is_tried(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(ENCRYPTED)
    variable = bt.Wallet("cold", "hot", str(tmp_path)).hotkey_file.env_var_name()
    monkeypatch.setitem(os.environ, variable, "d3Jvbmc=")
    with pytest.raises(keys.KeyUnusable, match=rf"hot does not open with \${variable}$"):
        keys.load("cold", "hot", tmp_path)


def options(network: str, wallets: Path, **others: Any) -> MinerOptions:
    return MinerOptions(
        network=network, wallet_name="cold", wallet_hotkey="hot", wallet_path=wallets, metrics_port=0, **others
    )


@pytest.mark.parametrize("content", [json.dumps(PUBLIC_HALF), ENCRYPTED])
async def test_the_miner_says_so_and_does_not_begin(
    file: Path, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    await asyncio.to_thread(file.write_text, content)
    miner = CompetitiveMiner(options("finney", tmp_path))
    assert await miner.run() == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"Wallet 'cold', hotkey 'hot': {file} ")
    assert not (tmp_path / "data").exists()


async def test_a_blacklist_that_is_not_there_is_said_before_anything_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = tmp_path / "blacklist"
    miner = CompetitiveMiner(options("rehearsal", tmp_path, blacklist_file=missing))
    assert await miner.run() == 1
    assert [record.getMessage() for record in caplog.records] == [f"Blacklist {missing}: No such file or directory"]
