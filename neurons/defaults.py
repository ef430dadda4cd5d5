"""Names and numbers that the miner and the rehearsal share. Imports nothing slow."""

from __future__ import annotations

from pathlib import Path

NETUID = 17
REHEARSAL = "rehearsal"
DATA = Path("data")
REHEARSAL_STATE = DATA / "rehearsal"
REHEARSAL_WALLET = "rehearsal"
REHEARSAL_HOTKEY = "miner"
