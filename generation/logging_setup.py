"""The service's log: one line for one event, in a rotating file, and on stderr where somebody reads it."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

MAX_BYTES = 10 * 1024 * 1024
BACKUPS = 5

# C0 and C1 controls, delete, Unicode's own line ends and the marks that reorder text: whatever could end a line,
# start a false one, or drive a terminal.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    """``text`` on one line: control characters as backslash escapes."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)


class SingleLineFormatter(logging.Formatter):
    """Escapes control characters in messages; a traceback follows indented, so that it can not pass for an entry."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        lines = super().formatException(ei).splitlines()  # type: ignore[arg-type]
        return "\n".join("    | " + escape(line) for line in lines)


def setup_logging(path: Path) -> None:
    """Log into ``path`` (10 MB, five older files kept) and to stderr.

    Raises OSError when it can not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
    ]
    if not _is_regular_file(sys.stderr):  # else nobody reads it now, and nothing would ever rotate that file
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(SingleLineFormatter())
    install(handlers)


def install(handlers: list[logging.Handler]) -> None:
    """Give ``handlers``, and no others, what is logged here: ours and the server's, others' warnings."""
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for name in ("generation", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)


def _is_regular_file(stream: object) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        return False
