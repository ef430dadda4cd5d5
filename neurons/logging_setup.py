"""Log files of the neurons: rotated, one record per line whatever a stranger's text contains."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

MAX_LOG_BYTES = 10 << 20
LOG_BACKUPS = 5
MAX_QUOTED_CHARACTERS = 120

# C0, DEL and C1 controls (terminal escapes among them), and the Unicode line and paragraph separators.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_CONTROLS |= {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def quoted(text: object) -> str:
    """A stranger's text for a log line: escaped, quoted, cut to MAX_QUOTED_CHARACTERS."""
    text = str(text)
    # Cut first: escaping a prompt of megabytes is work.
    cut = repr(text[:MAX_QUOTED_CHARACTERS])[1:-1][:MAX_QUOTED_CHARACTERS]
    return f"'{cut}'" if len(text) <= MAX_QUOTED_CHARACTERS else f"'{cut}...' ({len(text)} characters)"


class SingleLineFormatter(logging.Formatter):
    """Escapes control characters, so that no text can forge a log line; tracebacks keep their lines, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).translate(_CONTROLS)

    def formatException(self, ei: object) -> str:
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join("    | " + line.translate(_CONTROLS) for line in lines)


def configure(log_file: Path) -> None:
    """Sends all logging to `log_file`, and to stderr where that is a terminal.

    To be called after bittensor's import: that gives bittensor's logger a queue of its own to stdout and sets every
    other logger of the process to CRITICAL.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        RotatingFileHandler(log_file, maxBytes=MAX_LOG_BYTES, backupCount=LOG_BACKUPS, encoding="utf-8")
    ]
    if sys.stderr.isatty():
        handlers.append(logging.StreamHandler())
    formatter = SingleLineFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.getLogger("neurons").setLevel(logging.INFO)
    logging.getLogger("bittensor").handlers.clear()
