"""Studio's last results on disk, bounded in number and in bytes. No torch."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_RESULTS = 60
MOST_BYTES = 2 * 1024**3
ABOUT, SPLAT, THUMBNAIL, PICTURE, FILM = "about.json", "splat.ply", "thumbnail.webp", "picture.webp", "turntable.mp4"

log = logging.getLogger("generation.web.studio.gallery")


class Result(BaseModel):
    """One finished request, as the page shows it. Times are unix seconds."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9-]{1,64}$")
    made_at: float
    prompt: str | None  # None for an image prompt, which is kept as a file
    seed: int
    outcome: Literal["delivered", "rejected", "failed"]
    reason: str | None = None
    score: float | None = None
    parts: dict[str, float | None] = Field(default_factory=dict)
    candidates: list[tuple[int, float | None]] = Field(default_factory=list)  # (seed, score), if several
    num_gaussians: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)  # per stage
    files: tuple[str, ...] = ()  # those of the files named above that exist


class Gallery:
    """Keeps each result in a folder, which exists completely or not at all. Not thread-safe.

    Folders that cannot be read are skipped, with a log line.
    """

    def __init__(self, folder: Path, most: int = MOST_RESULTS, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._most, self._most_bytes = folder, most, most_bytes
        self._results: dict[str, Result] = {}
        self._bytes: dict[str, int] = {}
        with suppress(OSError):
            for each in folder.iterdir():
                if each.name.startswith(".new-"):  # left by a crash while writing
                    shutil.rmtree(each, ignore_errors=True)
        for result in sorted(self._read(), key=lambda result: result.made_at):
            self._results[result.id] = result
            self._bytes[result.id] = _size(folder / result.id)
        self._forget()

    def _read(self) -> Iterator[Result]:
        try:
            folders = list(self._folder.iterdir())
        except OSError:  # nothing was ever kept
            return
        for folder in folders:
            try:
                result = Result.model_validate_json((folder / ABOUT).read_bytes())
            except (OSError, ValidationError) as error:
                log.warning("Studio: %s is no result that can be read: %s", folder, type(error).__name__)
                continue
            if result.id == folder.name:
                yield result

    def __contains__(self, result_id: str) -> bool:
        return result_id in self._results

    def results(self) -> list[Result]:
        """All results, newest first."""
        return list(reversed(self._results.values()))

    def add(self, result: Result, files: Mapping[str, bytes]) -> None:
        """Add a result, and remove the oldest ones over the limits. Raises OSError when it cannot be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder))
        try:
            for name, content in files.items():
                (new / name).write_bytes(content)
            result = result.model_copy(update={"files": tuple(files)})
            (new / ABOUT).write_text(result.model_dump_json())
            new.chmod(0o755)
            new.rename(self._folder / result.id)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            raise
        self._results[result.id] = result
        self._bytes[result.id] = _size(self._folder / result.id)
        self._forget()

    def add_film(self, result_id: str, content: bytes) -> None:
        """Add a result's turntable, which is made on demand. Raises OSError, and KeyError when the result is gone."""
        result = self._results[result_id]
        result = result.model_copy(update={"files": (*result.files, FILM)})
        folder = self._folder / result_id
        (folder / FILM).write_bytes(content)
        half = folder / f"{ABOUT}.part"
        half.write_text(result.model_dump_json())
        half.replace(folder / ABOUT)
        self._results[result_id] = result
        self._bytes[result_id] += len(content)

    def path(self, result_id: str, name: str) -> Path | None:
        """Path of one of a result's files; None if it does not exist."""
        result = self._results.get(result_id)
        path = self._folder / result_id / name
        return path if result is not None and name in result.files and path.is_file() else None

    def remove(self, result_id: str) -> bool:
        """Remove a result. Returns whether it existed."""
        if self._results.pop(result_id, None) is None:
            return False
        self._bytes.pop(result_id)
        shutil.rmtree(self._folder / result_id, ignore_errors=True)
        return True

    def _forget(self) -> None:
        while self._results and (len(self._results) > self._most or sum(self._bytes.values()) > self._most_bytes):
            self.remove(next(iter(self._results)))


def _size(folder: Path) -> int:
    with suppress(OSError):
        return sum(each.stat().st_size for each in folder.iterdir())
    return 0


def as_json(result: Result) -> dict[str, Any]:
    """The result as the page gets it."""
    return dict(json.loads(result.model_dump_json()))
