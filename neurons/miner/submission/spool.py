"""Keeps results on disk until their outcome is known."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from neurons.protocol import Task

# Seconds. Validators close tasks within minutes, so older results are useless.
MAX_AGE_S = 3600.0
# Twice the possible number: one result for each of at most 256 neurons.
MAX_ENTRIES = 512
MAX_BYTES = 4 << 30
LOCK_NAME = "lock"
# Files of the first version have no version number. Files of a later version are dropped, like damaged ones.
FORMAT_VERSION = 1

_TASK: TypeAdapter[Task] = TypeAdapter(Task)

log = logging.getLogger(__name__)


class SpoolUnusable(Exception):
    """The spool's folder can not be used, or another miner uses it. The message is one line."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Locks the spool in `folder`, since another miner would submit these results as its own. Raises SpoolUnusable.

    The lock ends with its process, however that ends; the lock's file stays.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / LOCK_NAME).open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SpoolUnusable(f"Spool {folder} is in use by another miner: stop that one, or name another") from error
        except OSError as error:
            raise SpoolUnusable(f"Spool {folder}: {error.strerror}") from error
        yield


@dataclass(frozen=True)
class SpooledResult:
    """A result (`.spz`, b"" for nothing worth submitting) that waits for its validator's answer."""

    validator_hotkey: str
    task: Task
    result: bytes


class Spool:
    """One file per validator and task: a line of JSON, then the result's bytes.

    File names are hashes, since task ids come from strangers. Removing a file marks the result as answered, which is
    atomic: no crash can leave a half-made mark.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Answered entries, even if their files could not be deleted.
        self._removed: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, entry: SpooledResult) -> None:
        """Writes the entry atomically, and removes the oldest ones over the limits. Raises OSError (disk full)."""
        path = self._path(entry.validator_hotkey, entry.task.id)
        head = {
            "version": FORMAT_VERSION,
            "validator_hotkey": entry.validator_hotkey,
            "task": entry.task.model_dump(),
        }
        content = json.dumps(head).encode() + b"\n" + entry.result
        self._make_room(1, len(content))
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._removed.discard(path)
            self._sync_folder()
        finally:
            temporary.unlink(missing_ok=True)

    def get(self, validator_hotkey: str, task: Task) -> SpooledResult | None:
        """The entry for exactly this task; None also if it is too old, or has this id but another prompt."""
        path = self._path(validator_hotkey, task.id)
        if path in self._removed or self.age(validator_hotkey, task.id) > MAX_AGE_S:
            return None
        entry = self._read(path)
        return entry if entry is not None and entry.task == task else None

    def age(self, validator_hotkey: str, task_id: str) -> float:
        """Seconds since the entry was written; 0 if there is none."""
        try:
            return max(time.time() - self._path(validator_hotkey, task_id).stat().st_mtime, 0.0)
        except OSError:
            return 0.0

    def is_empty(self, validator_hotkey: str, task_id: str) -> bool:
        """Whether the entry is the empty result, for nothing worth submitting."""
        entry = self._read(self._path(validator_hotkey, task_id))
        return entry is not None and not entry.result

    def remove(self, validator_hotkey: str, task_id: str) -> None:
        """Removes an answered entry. Never raises OSError: a file that cannot be deleted is ignored from now on."""
        path = self._path(validator_hotkey, task_id)
        try:
            path.unlink(missing_ok=True)
            self._sync_folder()
        except OSError as error:
            self._removed.add(path)
            log.error("Spool: %s can not be removed: %s", path.name, error)

    def entries(self) -> list[tuple[str, str]]:
        """(validator hotkey, task id) of each entry, oldest first.

        Entries that are too old, unreadable or over the limits are dropped, with a log line.
        """
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        self._make_room(0, 0)
        entries = []
        for age, path, _ in self._files():
            entry = self._read(path) if age <= MAX_AGE_S else None
            if entry is not None:
                entries.append((entry.validator_hotkey, entry.task.id))
                continue
            log.warning("Spooled result %s dropped: %s", path.name, "damaged" if age <= MAX_AGE_S else "too old")
            path.unlink(missing_ok=True)
        return entries

    def _make_room(self, entries: int, size: int) -> None:
        """Removes the oldest entries, so that `entries` more with `size` bytes in all fit."""
        files = self._files()
        total = size + sum(file_size for _, _, file_size in files)
        for index, (_, path, file_size) in enumerate(files):
            if len(files) - index + entries <= MAX_ENTRIES and total <= MAX_BYTES:
                return
            log.warning("Spooled result %s dropped: the spool is full", path.name)
            path.unlink(missing_ok=True)
            total -= file_size

    def _files(self) -> list[tuple[float, Path, int]]:
        """(age in seconds, path, bytes) of all entries, oldest first."""
        files = []
        now = time.time()
        for path in self.folder.glob("*.result"):
            try:
                status = path.stat()
            except FileNotFoundError:  # it has just been answered
                continue
            files.append((now - status.st_mtime, path, status.st_size))
        return sorted(files, reverse=True)

    def _sync_folder(self) -> None:
        """Makes renames and removals outlast a power cut too."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _path(self, validator_hotkey: str, task_id: str) -> Path:
        name = hashlib.sha256(f"{validator_hotkey}\0{task_id}".encode(errors="surrogatepass")).hexdigest()
        return self.folder / f"{name}.result"

    @staticmethod
    def _read(path: Path) -> SpooledResult | None:
        try:
            head, _, result = path.read_bytes().partition(b"\n")
            fields = json.loads(head)
            if fields.get("version", 1) > FORMAT_VERSION:
                return None
            return SpooledResult(str(fields["validator_hotkey"]), _TASK.validate_python(fields["task"]), result)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
            return None
