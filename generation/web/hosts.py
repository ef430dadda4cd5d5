"""Checks of Host and Origin headers: the service has no authentication, so websites must not reach it.

A website can reach a service on its visitor's machine, or behind the visitor's tunnel, in two ways. It can give one of
its own names the service's address (DNS rebinding): ``Host`` shows that. Or it can send cross-site requests: browsers
mark them with ``Origin`` (the Fetch standard) and ``Sec-Fetch-Site`` (Fetch Metadata), which curl and other programs do
not send.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.log_lines import escape
from generation.schema.hosts import host_name, is_loopback

FLAG = "--allowed-hosts"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class SameSite:
    """ASGI middleware. ``allowed``: names and addresses that a ``Host`` may have, beside loopback's."""

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
    """The ``NAME:PORT`` of an ``Origin``; "" for "null", which any website can send."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""
