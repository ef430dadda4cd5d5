"""What the rehearsal's validators did, by their own books, for a comparison with the miner's: JSON lines."""

from __future__ import annotations

import json
from pathlib import Path


class TruthFile:
    """Appends to a file. Every line has `time` (unix seconds), `uid`, `validator` (hotkey) and `event`:

    - "start" and "crash" of the validator;
    - "assigned", "again" (the same task), "early" and "unregistered", of a pull, with `task` and `type`;
    - "submission", with `task`, `outcome` (accepted, declined, broken, empty, repetition or refused), `reason`,
      `score`, `began` (when it came in), `lost` (nobody got the answer), and `window`.

    Those of a miner have `miner` (hotkey), `cooldown_until` and `violations`.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def note(self, **fields: object) -> None:
        """Appends one event, as a line of JSON. Raises OSError."""
        self._file.write(json.dumps(fields) + "\n")

    def close(self) -> None:
        """No more events."""
        self._file.close()
