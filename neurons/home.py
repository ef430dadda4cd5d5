"""A home folder that can not be written, or none at all: bittensor's import makes folders in it, and fails."""

from __future__ import annotations

import os
from pathlib import Path


def do_without() -> str:
    """Makes bittensor's import work without one; returns what is wrong with the home folder, "" where nothing is.

    To be called before that import.
    """
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
