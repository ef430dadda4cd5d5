"""Websites do not reach the service; programs on this machine and those that are allowed do."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from generation.arguments import checked
from generation.schema.hosts import parse_names
from generation.settings import Settings
from generation.web.hosts import SameSite
from tests.support.service_harness import Service, serving


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def send(service: Service, method: str, path: str, headers: dict[str, str], body: str = "") -> tuple[int, dict]:
    """Status and JSON. Headers are sent as they are, ``Host`` among them."""
    connection = http.client.HTTPConnection(urlsplit(service.url).netloc, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders(body.encode())
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content.startswith(b"{") else {}


FORM = {"Content-Type": "application/x-www-form-urlencoded"}
OURS = [
    "localhost", "localhost:10006", "LOCALHOST.:1", "127.0.0.1", "127.0.0.1:10016", "127.8.8.8", "[::1]:10006",
    "[0:0:0:0:0:0:0:1]", "x.localhost:80", "gpu.example", "GPU.example.:10006", "10.0.0.5:10006",
]  # fmt: skip
FOREIGN = [
    "evil.example", "evil.example:10006", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", "", "x y",
    "gpu.example.evil.example", "evil.example@localhost", "localhost:10006@evil.example", "10.0.0.6", "[::2]",
    "0.0.0.0", "localhost:evil", "[::1].evil.example", "2130706433x",
]  # fmt: skip


@pytest.mark.parametrize("host", OURS)
def test_its_own_names_are_answered(service: Service, host: str) -> None:
    """Behind whatever port a tunnel has."""
    assert send(service, "GET", "/health", {"Host": host})[0] == 200
    assert send(service, "POST", "/generate/", {"Host": host, **FORM}, "prompt=a")[0] == 200


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/events"), ("POST", "/generate/")])
def test_foreign_names_are_refused(service: Service, host: str, method: str, path: str) -> None:
    """As a website's name would be that has come to stand for this machine's address (DNS rebinding)."""
    before = service.engine.totals["requests"]
    status, answer = send(service, method, path, {"Host": host, **FORM}, "prompt=a")
    assert (status, answer["error"]["field"]) == (421, "Host")
    assert "--allowed-hosts" in answer["error"]["message"]
    assert host in answer["error"]["message"]
    assert {"localhost", "127.0.0.1", "[::1]", "gpu.example"} <= set(answer["error"]["limit"])
    assert service.engine.totals["requests"] == before


@pytest.mark.parametrize("hosts", [[], ["localhost", "evil.example"], ["localhost", "localhost"]])
async def test_a_request_names_one_host(hosts: list[str]) -> None:
    """As HTTP/1.0 need not, and as no server has to insist on (RFC 9112, 3.2)."""
    sent: list[Any] = []

    async def unreachable(*_: Any) -> None:
        raise AssertionError("the request went through")

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode()) for host in hosts]}
    await SameSite(unreachable, ())(scope, receive, send)
    assert sent[0]["status"] == 421


#: What browsers send for a website's request, by the Fetch standard and Fetch Metadata.
CROSS_SITE = [
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    {"Origin": "https://evil.example"},  # to an address that is no secure context there is no Sec-Fetch-Site
    {"Origin": "http://localhost.evil.example:80"},
    {"Origin": "null", "Sec-Fetch-Site": "cross-site"},  # a sandboxed frame, a file
    {"Origin": "null"},
    {"Origin": "moz-extension://localhost"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
]


@pytest.mark.parametrize("headers", CROSS_SITE)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/generate/"), ("GET", "/health"), ("GET", "/events"), ("OPTIONS", "/generate/")]
)
def test_requests_of_other_sites_are_refused(service: Service, headers: dict[str, str], method: str, path: str) -> None:
    before = service.engine.totals["requests"]
    status, answer = send(service, method, path, {"Host": "127.0.0.1:10006", **FORM, **headers}, "prompt=a")
    assert status == 403
    assert answer["error"]["field"] in ("Origin", "Sec-Fetch-Site")
    assert "another site" in answer["error"]["message"]
    assert service.engine.totals["requests"] == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://127.0.0.1:10006", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "http://gpu.example:10006"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"},
    ],
)
def test_its_own_pages_and_typed_addresses_are_answered(service: Service, headers: dict[str, str]) -> None:
    assert send(service, "POST", "/generate/", {"Host": "127.0.0.1:10006", **FORM, **headers}, "prompt=a")[0] == 200


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({}, ()),
        ({"host": "0.0.0.0"}, ()),
        ({"host": "::"}, ()),
        ({"host": "10.0.0.5"}, ("10.0.0.5",)),
        ({"host": "::", "allowed_hosts": "GPU.example., fe80::A,[fe80::b]"}, ("gpu.example", "fe80::a", "fe80::b")),
    ],
)
def test_loopback_alone_unless_it_is_told(values: dict[str, str], allowed: tuple[str, ...]) -> None:
    """Or listens on one address: nobody could reach it by another."""
    assert Settings.resolve({"profile": "tiny", **values}).allowed_hosts == allowed


@pytest.mark.parametrize("text", ["http://gpu.example", "gpu.example:10006", "*", "a b", ",", "a,,b", "[::1]:80"])
def test_what_is_no_name_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="separated by commas and without ports"):
        parse_names(text)
    with pytest.raises(ValueError, match="separated by commas and without ports"):
        checked({"allowed_hosts": text})
