"""A model hub on loopback: the routes that a download uses, and the ways in which one goes wrong."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which on a file is kept outside of git
ENDLESS = 300_000_000


@dataclass
class Repository:
    commit: str
    files: dict[str, bytes]
    gated: bool = False
    forged: dict[str, bytes] = field(default_factory=dict)  # sent in place of what is listed
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # bytes after which the next answers break off
    reset_after: dict[str, list[int]] = field(default_factory=dict)  # the same, by a reset
    signed: bool = False  # large files are at addresses that are good for one answer each
    stall_after: dict[str, int] = field(default_factory=dict)  # bytes after which answers wait for `Hub.go_on`
    endless: set[str] = field(default_factory=set)  # sent without a length, until nobody takes it or ENDLESS bytes
    relabelled: set[str] = field(default_factory=set)  # have another hash in their headers than in the list


@dataclass
class Hub:
    repositories: dict[str, Repository]
    url: str = ""
    sent: int = 0  # bytes of endless answers
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    go_on: threading.Event = field(default_factory=threading.Event)

    def fetched(self, name: str) -> list[str]:
        """The ranges that a file was asked for, in order; empty for all of it."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(f"/{name}")]


def digest(content: bytes) -> str:
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    hub = Hub(repositories)
    signatures, used = itertools.count(), set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            signature = re.match(r"/signed/(\d+)(/.*)", path)
            if signature:
                if body and signature[1] in used:
                    return self.refuse(403, "")
                used.update([signature[1]] if body else [])
                path = signature[2]
            match = re.match(r"/(api/models/)?([^/]+/[^/]+)/(auth-check|revision|resolve)(?:/([^/]+)/?(.*))?$", path)
            repository = hub.repositories.get(match[2]) if match else None
            if match is None or repository is None:
                return self.refuse(404, "RepoNotFound")
            _, _, action, revision, name = match.groups()
            if action != "revision" and repository.gated:
                return self.refuse(403, "GatedRepo")
            if action == "auth-check":
                return self.send(200, {}, b"{}", body)
            if revision not in ("main", repository.commit):
                return self.refuse(404, "RevisionNotFound")
            if action == "revision":
                return self.send(200, {}, json.dumps(listing(match[2], repository)).encode(), body)
            if name not in repository.files:
                return self.refuse(404, "EntryNotFound")
            if repository.signed and not signature and len(repository.files[name]) >= LARGE:
                return self.send(302, {"Location": f"/signed/{next(signatures)}{path}"}, b"", body)
            self.send_file(repository, name, body)

        def send_file(self, repository: Repository, name: str, body: bool) -> None:
            listed = repository.files[name]
            content = repository.forged.get(name, listed)
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{digest(listed)}"', "Accept-Ranges": "bytes"}
            if name in repository.relabelled:
                headers["ETag"] = '"' + "e" * 64 + '"'
            if name in repository.endless:
                return self.send_endless(headers, body)
            wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
            assert wanted is not None
            start = int(wanted[1])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if body and name in repository.stall_after:
                self.send(200, headers, content, body, cut=repository.stall_after[name])
                hub.go_on.wait()
                return
            resets = repository.reset_after.get(name)
            if body and resets:
                self.send(206 if start else 200, headers, content[start:], body, cut=resets.pop(0))
                return self.reset()
            cuts = repository.cut_after.get(name)
            self.send(206 if start else 200, headers, content[start:], body, cuts.pop(0) if body and cuts else None)

        def send(self, status: int, headers: dict, content: bytes, body: bool, cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content[:cut])
                self.wfile.flush()
            if cut is not None:
                self.close_connection = True

        def send_endless(self, headers: dict, body: bool) -> None:
            self.send_response(200)
            for key, value in {**headers, "Connection": "close"}.items():
                self.send_header(key, value)
            self.end_headers()
            with suppress(ConnectionError):
                while body and hub.sent < ENDLESS:
                    hub.sent += self.wfile.write(bytes(1 << 20))

        def reset(self) -> None:
            """Close with RST. By the descriptor: the server's own way of closing would send FIN before it."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def listing(name: str, repository: Repository) -> dict:
    """The hub's description of a repository with its files' sizes and hashes."""
    siblings = []
    for path, content in repository.files.items():
        sibling: dict = {"rfilename": path, "size": len(content), "blobId": "0" * 40}
        if len(content) >= LARGE:
            sibling["lfs"] = {"sha256": digest(content), "size": len(content), "pointerSize": 130}
        else:
            sibling["blobId"] = digest(content)
        siblings.append(sibling)
    return {"id": name, "modelId": name, "sha": repository.commit, "gated": "auto" if repository.gated else False,
            "private": False, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
