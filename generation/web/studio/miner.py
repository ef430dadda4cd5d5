"""The miner's activity, fetched from its metrics port for the page."""

from __future__ import annotations

import json
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

PATH = "/activity"
PATIENCE_S = 2.0
MOST_BYTES = 1024 * 1024


class NoMiner(Exception):
    """The miner's activity is not available. The message is for the page."""


def activity(url: str) -> dict[str, Any]:
    """The activity of the miner at ``url`` (http, host, port), without proxies or redirects. Raises NoMiner."""
    place = urlsplit(url)
    try:
        with closing(HTTPConnection(place.hostname or "", place.port or 80, timeout=PATIENCE_S)) as connection:
            connection.request("GET", PATH)
            answer = connection.getresponse()
            content = answer.read(MOST_BYTES + 1)
    except (OSError, HTTPException) as error:
        raise NoMiner(f"No miner answers at {url}: {error or type(error).__name__}") from error
    if answer.status == 200 and len(content) <= MOST_BYTES:
        try:
            told = json.loads(content)
        except (ValueError, RecursionError):
            told = None
        if isinstance(told, dict):
            return told
    raise NoMiner(f"What answers at {url} is no miner, or one of an earlier version")
