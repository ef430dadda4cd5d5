"""Who may speak to the service through a browser: it asks nobody who they are, so a website must not reach it.

Two ways lead from a website to a service on the visitor's own machine, or behind its tunnel: a name of the website's
that stands for the service's address (DNS rebinding), told by ``Host``; and a request across sites, which browsers mark
with ``Origin`` (the Fetch standard) and ``Sec-Fetch-Site`` (Fetch Metadata). curl and other programs send neither.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from generation.logging_setup import escape

FLAG = "--allowed-hosts"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_NAME = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
_HOST = re.compile(rf"(?P<name>{_NAME}(\.{_NAME})*\.?|\[[0-9a-f:.]+\])(?P<port>:[0-9]{{0,5}})?", re.ASCII)


def host_name(text: str) -> str | None:
    """The name or address in ``NAME``, ``NAME:PORT`` or ``[ADDRESS]:PORT``, in one spelling; None when it is none."""
    found = _HOST.fullmatch(text.strip().lower())
    if found is None:
        return None
    name = found["name"].rstrip(".")
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return None if name.startswith("[") else name


def parse_names(text: str) -> tuple[str, ...]:
    """Names and addresses separated by commas, in one spelling. Raises ValueError naming the one that is none."""
    names = []
    for each in text.split(","):
        given = each.strip().lower()
        given = f"[{given}]" if given.count(":") > 1 and not given.startswith("[") else given
        found, name = _HOST.fullmatch(given), host_name(given)
        if found is None or name is None or found["port"]:
            raise ValueError(f"must be names or addresses, separated by commas and without ports; not so: {each!r}")
        names.append(name)
    return tuple(names)


def is_loopback(name: str) -> bool:
    """Whether it stands for this machine wherever it is looked up."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def is_wildcard(host: str) -> bool:
    """Whether to listen there is to listen on all addresses."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


class SameSite:
    """ASGI middleware. ``allowed``: names and addresses that a request may call the service by, beside loopback's."""

    def __init__(self, app: ASGIApp, allowed: tuple[str, ...]) -> None:
        self.app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Headers(scope=scope))) is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            shown = escape(", ".join(hosts)[:100]) or "(none)"
            return self._answer(421, "Host", f"the service does not answer to {shown}; the flag {FLAG} adds it")
        if not all(self._is_ours(_host_of(origin)) for origin in origins):
            shown = escape(", ".join(origins)[:100])
            return self._answer(403, "Origin", f"a request of another site, {shown}; the flag {FLAG} adds it")
        if headers.get("sec-fetch-site") == "cross-site":
            return self._answer(403, "Sec-Fetch-Site", "a request of another site; to open a page, type its address")
        return None

    def _is_ours(self, text: str) -> bool:
        name = host_name(text)
        return name is not None and (is_loopback(name) or name in self._allowed)

    def _answer(self, status: int, field: str, message: str) -> JSONResponse:
        limit = [*LOOPBACK, *self._allowed]
        return JSONResponse({"error": {"field": field, "message": message, "limit": limit}}, status)


def _host_of(origin: str) -> str:
    """The ``NAME:PORT`` of an ``Origin``; nothing of "null", which any website can send."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""
