"""Makes bittensor importable without a writable home folder, in which its import creates folders."""

from __future__ import annotations

import os
from pathlib import Path


def prepare() -> str:
    """To be called before bittensor's import. Returns what is wrong with the home folder; "" if it is usable."""
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and no entry for this user in /etc/passwd
        os.environ["HOME"] = os.devnull  # where nothing can be made
        home = Path.home()
    try:
        for name in ("wallets", "miners"):
            (home / ".bittensor" / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        os.environ["READ_ONLY"] = "1"  # bittensor's own word for it
        return f"Home folder {home}: {error.strerror}"
    return ""
