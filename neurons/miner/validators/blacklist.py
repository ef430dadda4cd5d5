"""Validators that are never asked, by UID or hotkey: from the command line, and from a file that may change."""

from __future__ import annotations

import codecs
import logging
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from common.log_lines import quoted

MAX_FILE_BYTES = 1 << 20
MAX_UID = 65535
# SS58 in base58, without checking its checksum: a mistyped hotkey is nobody's.
_HOTKEY = re.compile(r"[1-9A-HJ-NP-Za-km-z]{46,49}")

log = logging.getLogger(__name__)


class BlacklistUnreadable(Exception):
    """The message names the file and says why."""


def parse_entry(text: str) -> int | str:
    """A UID or a hotkey. Raises ValueError."""
    if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= MAX_UID:
        return int(text)
    if _HOTKEY.fullmatch(text):
        return text
    raise ValueError(f"{quoted(text)} is neither a UID (0 to {MAX_UID}) nor a hotkey")


class Blacklist:
    """`uid in blacklist`, `hotkey in blacklist`. The file has one entry a line, and comments after a #.

    It is text in UTF-8 or UTF-16 with whatever line ends and byte order marks: people edit it with what they have.
    """

    def __init__(self, entries: Iterable[int | str], file: Path | None = None) -> None:
        self._fixed = frozenset(entries)
        self._file = file
        self._from_file: frozenset[int | str] = frozenset()
        self._seen: tuple[int, int, int] | None = None
        self._problem = ""

    def __contains__(self, entry: object) -> bool:
        return entry in self._fixed or entry in self._from_file

    def load(self) -> None:
        """Reads the file, which has to be there at the start. Raises BlacklistUnreadable."""
        try:
            self._update()
        except (OSError, ValueError) as error:
            raise BlacklistUnreadable(f"Blacklist {self._file}: {_reason(error)}") from error

    def reload(self) -> bool:
        """Reads the file when it has changed; whether the blacklist is another one now.

        A file that has gone or can not be read leaves the blacklist as it was, with one log line.
        """
        try:
            return self._update()
        except (OSError, ValueError) as error:
            problem = _reason(error)
            if problem != self._problem:
                kept = len(self._from_file)
                log.error("Blacklist %s: %s; the %d entries of before stay in force", self._file, problem, kept)
            self._problem = problem
            self._seen = None
            return False

    def _update(self) -> bool:
        """As `reload`. Raises OSError or ValueError."""
        content = None if self._file is None else self._read_if_changed(self._file)
        if content is None:
            return False
        entries = self._parse(content)
        changed = entries != self._from_file
        if changed or self._problem:
            log.info("Blacklist %s: %d entries", self._file, len(entries))
        self._from_file = entries
        self._problem = ""
        return changed

    def _read_if_changed(self, file: Path) -> str | None:
        status = file.stat()
        seen = status.st_ino, status.st_mtime_ns, status.st_size
        if seen == self._seen:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        text = _decode(file.read_bytes())
        self._seen = seen
        return text

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


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _decode(content: bytes) -> str:
    """The text of a file. Raises ValueError."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError("neither UTF-8 nor UTF-16 with a byte order mark")
    return text.replace("\ufeff", "")
