"""The hotkey that the miner signs with, from a wallet's file."""

from __future__ import annotations

import os
from pathlib import Path

import bittensor as bt


class KeyUnusable(Exception):
    """There is no key to mine with. The message says why in one line, and quotes nothing of the file."""


def load(wallet_name: str, hotkey: str, folder: Path) -> bt.Keypair:
    """The hotkey of a wallet in `folder`. Raises KeyUnusable."""
    wallet = bt.Wallet(wallet_name, hotkey, str(folder))
    file = wallet.hotkey_file
    path = Path(file.path)

    def unusable(reason: str) -> KeyUnusable:
        return KeyUnusable(f"Wallet {wallet_name!r}, hotkey {hotkey!r}: {path} {reason}")

    try:
        path.read_bytes()
    except OSError as error:
        raise unusable(f"can not be read: {error.strerror}") from None
    is_encrypted = False
    try:
        is_encrypted = file.is_encrypted()
        if is_encrypted and file.env_var_name() not in os.environ:
            # bittensor would ask for it at the terminal, where mostly nobody is.
            raise unusable("has a password, and the miner asks nobody for it: mine with a hotkey that has none")
        keypair = wallet.hotkey
    except bt.KeyFileError:
        # The library's own words may quote the file.
        problem = f"does not open with ${file.env_var_name()}" if is_encrypted else "holds no key that can be read"
        raise unusable(problem) from None
    try:
        keypair.sign(b"whether it can")
    except Exception as error:  # bittensor exports no type for it
        raise unusable("holds a public key alone, which can not sign") from error
    return keypair
