"""The service's log: one line for one event, in a rotating file, and on stderr where somebody reads it."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from common.log_lines import SingleLineFormatter, is_regular_file

MAX_BYTES = 10 * 1024 * 1024
BACKUPS = 5


def setup_logging(path: Path) -> None:
    """Log into ``path`` (10 MB, five older files kept) and to stderr.

    Raises OSError when it can not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8")
    ]
    if not is_regular_file(sys.stderr):  # else nobody reads it now, and nothing would ever rotate that file
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
