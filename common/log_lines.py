"""Log lines of untrusted text: one line per event."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Mapping

MAX_QUOTED_CHARACTERS = 120
#: the parts of a score, as the API names them -> as people read them
SCORE_PARTS = {"iqa": "quality", "alignment": "alignment", "ssim": "SSIM", "lpips": "LPIPS"}

_NODE = re.compile(r"wss?://\S+")
# C0 and C1 controls, delete, Unicode's own line ends and the marks that reorder text: whatever could end a line,
# start a false one, or drive a terminal.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    """``text`` on one line: control characters as backslash escapes."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def quoted(text: object) -> str:
    """Untrusted text for a log line: escaped, quoted, cut to MAX_QUOTED_CHARACTERS."""
    text = str(text)
    # Cut first: escaping a prompt of megabytes is work.
    cut = repr(text[:MAX_QUOTED_CHARACTERS])[1:-1][:MAX_QUOTED_CHARACTERS]
    return f"'{cut}'" if len(text) <= MAX_QUOTED_CHARACTERS else f"'{cut}...' ({len(text)} characters)"


def score_in_words(score: float, parts: Mapping[str, float]) -> str:
    """A score with its parts: ``0.71 (quality 0.66, alignment 0.76, SSIM 0.93, LPIPS 0.81)``."""
    return f"{score:.2f} ({', '.join(f'{SCORE_PARTS[part]} {value:.2f}' for part, value in parts.items())})"


class SingleLineFormatter(logging.Formatter):
    """Escapes control characters and removes nodes' keys. A traceback follows indented, so that it can not pass for an
    entry.
    """

    def __init__(self, fmt: str = "%(asctime)s %(levelname)s %(name)s: %(message)s") -> None:
        super().__init__(fmt)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape(without_keys(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        lines = super().formatException(ei).splitlines()  # type: ignore[arg-type]
        return "\n".join("    | " + escape(without_keys(line)) for line in lines)


def shown_network(network: str) -> str:
    """A chain's name, or its node's ``ws://`` address without user, password, path and query: these may hold a key."""
    scheme, separator, rest = network.partition("://")
    if not separator:
        return network
    return f"{scheme}://{re.split('[/?#]', rest, maxsplit=1)[0].rpartition('@')[2]}"


def without_keys(text: str) -> str:
    """``text`` with each ``ws://`` address in it as `shown_network` shows it. Libraries log the whole address."""
    return _NODE.sub(lambda match: shown_network(match.group()), text)


def is_regular_file(stream: object) -> bool:
    """Whether the stream is a file, which nobody rotates, and not a terminal, journal or pipe."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        return False
