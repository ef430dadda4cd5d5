"""Validators that are never asked, by UID or hotkey: from the command line, and from a file that may change."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from neurons.logging_setup import quoted

MAX_FILE_BYTES = 1 << 20
MAX_UID = 65535
# SS58 in base58, without checking its checksum: a mistyped hotkey is nobody's.
_HOTKEY = re.compile(r"[1-9A-HJ-NP-Za-km-z]{46,49}")

_ABSENT = (0.0, -1)

log = logging.getLogger(__name__)


def parse_entry(text: str) -> int | str:
    """A UID or a hotkey. Raises ValueError."""
    if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= MAX_UID:
        return int(text)
    if _HOTKEY.fullmatch(text):
        return text
    raise ValueError(f"{quoted(text)} is neither a UID (0 to {MAX_UID}) nor a hotkey")


class Blacklist:
    """`uid in blacklist`, `hotkey in blacklist`. The file has one entry a line, and comments after a #."""

    def __init__(self, entries: Iterable[int | str], file: Path | None = None) -> None:
        self._fixed = frozenset(entries)
        self._file = file
        self._from_file: frozenset[int | str] = frozenset()
        self._seen: tuple[float, int] | None = None
        self._problem = ""

    def __contains__(self, entry: object) -> bool:
        return entry in self._fixed or entry in self._from_file

    def reload(self) -> bool:
        """Reads the file when it has changed; whether the blacklist is another one now.

        A file that can not be read leaves the blacklist as it was; one that is not there is empty, with a warning.
        """
        if self._file is None:
            return False
        try:
            content = self._read_if_changed(self._file)
        except (OSError, ValueError) as error:
            if str(error) != self._problem:
                log.error("Blacklist %s: %s; what was known stays in force", self._file, error)
            self._problem = str(error)
            return False
        self._problem = ""
        if content is None:
            return False
        entries = self._parse(content)
        changed = entries != self._from_file
        self._from_file = entries
        if changed:
            log.info("Blacklist %s: %d entries", self._file, len(entries))
        return changed

    def _read_if_changed(self, file: Path) -> str | None:
        try:
            status = file.stat()
        except FileNotFoundError:
            if self._seen == _ABSENT:
                return None
            self._seen = _ABSENT
            log.warning("Blacklist %s: not there, so nobody is left out by it", file)
            return ""
        seen = status.st_mtime, status.st_size
        if seen == self._seen:
            return None
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        content = file.read_text(encoding="utf-8")
        self._seen = seen
        return content

    def _parse(self, content: str) -> frozenset[int | str]:
        entries: set[int | str] = set()
        for number, line in enumerate(content.splitlines(), start=1):
            text = line.partition("#")[0].strip()
            try:
                if text:
                    entries.add(parse_entry(text))
            except ValueError as error:
                log.error("Blacklist %s, line %d: %s; left out", self._file, number, error)
        return frozenset(entries)
