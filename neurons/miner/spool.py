"""Results on disk from the moment that they are made until their validator has answered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from neurons.protocol import Task

# Tasks are long gone after that: validators close them within minutes.
MAX_AGE_S = 3600.0

_TASK: TypeAdapter[Task] = TypeAdapter(Task)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpooledResult:
    """A result (`.spz`, b"" for nothing worth submitting) that waits for its validator's answer."""

    validator_hotkey: str
    task: Task
    result: bytes


class Spool:
    """One file per validator and task: a line of JSON, then the result's bytes.

    File names are hashes: task ids come from strangers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, entry: SpooledResult) -> None:
        """Writes the entry, whole or not at all. Raises OSError (disk full)."""
        path = self._path(entry.validator_hotkey, entry.task.id)
        head = {"validator_hotkey": entry.validator_hotkey, "task": entry.task.model_dump()}
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(json.dumps(head).encode() + b"\n" + entry.result)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def get(self, validator_hotkey: str, task: Task) -> SpooledResult | None:
        """The entry for exactly this task; None too when its id is known but its prompt is another."""
        entry = self._read(self._path(validator_hotkey, task.id))
        return entry if entry is not None and entry.task == task else None

    def remove(self, validator_hotkey: str, task_id: str) -> None:
        self._path(validator_hotkey, task_id).unlink(missing_ok=True)

    def load(self) -> list[SpooledResult]:
        """All entries, oldest first. Those that are too old or not readable are dropped, with a log line."""
        for leftover in self._folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        entries = []
        for path in sorted(self._folder.glob("*.result"), key=lambda path: path.stat().st_mtime):
            age = time.time() - path.stat().st_mtime
            entry = self._read(path) if age <= MAX_AGE_S else None
            if entry is not None:
                entries.append(entry)
                continue
            log.warning("Spooled result %s dropped: %s", path.name, "damaged" if age <= MAX_AGE_S else "too old")
            path.unlink(missing_ok=True)
        return entries

    def _path(self, validator_hotkey: str, task_id: str) -> Path:
        name = hashlib.sha256(f"{validator_hotkey}\0{task_id}".encode(errors="surrogatepass")).hexdigest()
        return self._folder / f"{name}.result"

    @staticmethod
    def _read(path: Path) -> SpooledResult | None:
        try:
            head, _, result = path.read_bytes().partition(b"\n")
            fields = json.loads(head)
            return SpooledResult(str(fields["validator_hotkey"]), _TASK.validate_python(fields["task"]), result)
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None
