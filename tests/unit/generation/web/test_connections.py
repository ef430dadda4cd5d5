"""How long a client can hold a connection."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from generation import serve_competitive
from generation.pipeline.pipeline import Asset, Report
from generation.web import connections
from tests.support.service_harness import PATIENCE_S, Service, StandInPipeline, serving, wait_until

REFUSED = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
GET = b"GET /version/ HTTP/1.1\r\nHost: localhost\r\n\r\n"
FORM = b"prompt=a+red+cube"
POST = b"POST /generate/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
SPLAT_BYTES = 30_000_000  # more than the kernel buffers


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(connections, "REQUEST_S", 0.2)
    monkeypatch.setattr(serve_competitive, "STALL_S", 1)
    with serving() as service:
        yield service


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), PATIENCE_S)


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_a_connection_without_a_request_is_closed(service: Service) -> None:
    """``first``, and once it was answered ``then``: what comes later puts nothing off."""
    held = []
    for first, then in ((b"", b""), (b"GET / HT", b""), (POST + b"A: b", b""), (GET, b"GET"), (REFUSED, b"a")):
        held.append(connection := connect(service))
        connection.sendall(first)
        if then:
            assert connection.recv(1000).startswith(b"HTTP/1.1 ")
            connection.sendall(then)
    wait_until(lambda: all([is_closed(connection) for connection in held]), 3)
    for connection in held:
        connection.close()


def test_who_sends_the_body_of_a_refused_request_can_go_on(service: Service) -> None:
    with connect(service) as connection:
        connection.sendall(REFUSED)
        connection.sendall(bytes(900_000) + GET)
        answers = b""
        while b"HTTP/1.1 200" not in answers:
            answers += (got := connection.recv(1 << 16))
            assert got, answers
    assert answers.startswith(b"HTTP/1.1 404")


def test_a_request_in_progress_keeps_its_connection_until_its_end(service: Service) -> None:
    with connect(service) as connection:
        connection.sendall(POST + b"Content-Length: 11\r\n\r\nprompt=hold")
        time.sleep(3 * connections.REQUEST_S)
        service.pipeline.go.set()
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(b"G")
        wait_until(lambda: is_closed(connection), 3)


@pytest.mark.slow
def test_an_answer_may_be_read_slowly_but_not_left_unread(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    splat = Asset(bytes(SPLAT_BYTES), Report(1))
    monkeypatch.setattr(StandInPipeline, "_one", lambda self, job: splat)
    request = POST + b"Content-Length: %d\r\n\r\n%s" % (len(FORM), FORM)
    with connect(service) as slow, connect(service) as never:
        slow.sendall(request)
        never.sendall(request)
        got = 0
        while piece := slow.recv(SPLAT_BYTES // 20, socket.MSG_WAITALL):
            got += len(piece)
            time.sleep(2 * connections.REQUEST_S / 20)
        assert got > SPLAT_BYTES
        wait_until(lambda: not service.server.server_state.connections, 10)  # though the client is still there
