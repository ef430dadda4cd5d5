"""What a deployment asks about ports and about the processes that it started. Standard library only.

``probe.py service URL`` and ``probe.py miner STATUS_FILE`` tell whether one is healthy, for container health checks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.request
from base64 import b64encode
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

LOADING_S = 1800  # full-size weights from a slow disk
WORKERS = 4  # at least, and for a service that does not tell
MAX_WORKERS = 64
STATUS_FRESH_S = 60.0


def alive(pid: int) -> bool:
    """False for a zombie too: its parent, the deploy script, does not collect it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def check_port(host: str, port: int) -> str | None:
    """None when it can be listened on, else why not."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        return f"--host {host}: {getattr(error, 'strerror', None) or error}"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            reason = f"can not listen on {host} port {port}: {error.strerror}"
            holder = port_holder(port)
            return f"{reason}, held by {holder}" if holder else reason
    return None


def port_holder(port: int) -> str | None:
    """``PID (command line)`` of who listens on ``port``, where /proc shows it to us."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue
        listening = [row for row in rows if row[3] == "0A"]
        inodes |= {f"socket:[{row[9]}]" for row in listening if int(row[1].rpartition(":")[2], 16) == port}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"PID {process.name} ({command[:120]})"
        except OSError:  # not ours to look at, or gone meanwhile
            continue
    return None


def health_of(url: str) -> dict[str, Any]:
    """What the service says of itself. Raises OSError, HTTPException or ValueError when it does not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    # urllib takes a user and a password for a part of the host's name.
    parts = urlsplit(f"{url}/health")
    user, at, host = parts.netloc.rpartition("@")
    if at:
        opener.addheaders.append(("Authorization", f"Basic {b64encode(unquote(user).encode()).decode()}"))
    with opener.open(urlunsplit(parts._replace(netloc=host)), timeout=10) as answer:
        health: dict[str, Any] = json.load(answer)
    return health


def workers_for(urls: list[str]) -> int:
    """One for each request that the services work on at once, within limits."""
    places = 0
    for url in urls:
        try:
            places += sum(int(engine["at_once"]) for engine in health_of(url.rstrip("/"))["engines"])
        except (OSError, HTTPException, ValueError, LookupError, TypeError):
            named = url.rpartition("@")[2].rpartition("//")[2].split("/")[0]
            print(f"  the service at {named} does not tell how much it works on at once: {WORKERS} workers for it")
            places += WORKERS
    return min(max(places, WORKERS), MAX_WORKERS)


def wait_for_service(url: str, pid: int) -> str | None:
    """Print the service's progress until it is ready (None), or return why it is not."""
    started, told = time.monotonic(), ""
    while time.monotonic() - started < LOADING_S:
        if not alive(pid):
            return "the generation service ended while it was starting"
        try:
            health = health_of(url)
        except (OSError, HTTPException, ValueError):
            time.sleep(0.2)
            continue
        if health["status"] == "ready":
            print(f"  [{time.monotonic() - started:5.1f} s] ready: profile {health['profile']}", flush=True)
            print(f"  {health['profile_reason']}", flush=True)
            return None
        if health["status"] == "failed":
            return f"the generation service: {health['reason']}"
        if health["reason"] != told:
            told = health["reason"]
            print(f"  [{time.monotonic() - started:5.1f} s] {told}", flush=True)
        time.sleep(0.2)
    return f"the generation service was not ready within {LOADING_S} s"


def wait_for_file(path: Path, pid: int, seconds: float, status: bool) -> str | None:
    """None once ``path`` is there (and says that it is ready, when it holds a status), else why not.

    A process with a status that is not ready in time is left to go on: it says what it waits for.
    """
    deadline, told = time.monotonic() + seconds, ""
    while True:
        state = read_status(path) if status else ("ready" if path.exists() else "")
        if state == "ready":
            return None
        if state and state != told:
            told = state
            print(f"  {told}", flush=True)
        if not alive(pid):
            return "the process ended while it was starting"
        if time.monotonic() > deadline and told:
            print(f"  still after {seconds:.0f} s: {told}; it goes on trying", flush=True)
            return None
        if time.monotonic() > deadline:
            return f"not ready within {seconds:.0f} s"
        time.sleep(0.1)


def read_status(path: Path) -> str:
    """What the JSON in ``path`` gives as its status; nothing while there is none."""
    try:
        return str(json.loads(path.read_text())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def main(kind: str, where: str) -> int:
    """Exit status 0 for healthy. The miner is while it says of itself what it does: every second or so."""
    if kind == "service":
        try:
            return health_of(where)["status"] != "ready"
        except (OSError, HTTPException, ValueError, LookupError):
            return 1
    try:
        return time.time() - Path(where).stat().st_mtime > STATUS_FRESH_S
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
