"""Log files of miner and rehearsal: rotated, one record per line, even with untrusted text."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

from common.log_lines import SingleLineFormatter, is_regular_file

MAX_LOG_BYTES = 10 << 20
LOG_BACKUPS = 5


def configure(log_file: Path) -> None:
    """Sends all logging to `log_file`, and to stderr where that is no file.

    To be called after bittensor's import: that gives bittensor's logger a queue of its own to stdout and sets every
    other logger of the process to CRITICAL.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        RotatingFileHandler(log_file, maxBytes=MAX_LOG_BYTES, backupCount=LOG_BACKUPS, encoding="utf-8")
    ]
    if not is_regular_file(sys.stderr):
        handlers.append(logging.StreamHandler())
    formatter = SingleLineFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).setLevel(logging.NOTSET)
    logging.getLogger("neurons").setLevel(logging.INFO)
    logging.getLogger("bittensor").handlers.clear()
