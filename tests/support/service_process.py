"""The service as a process of its own, with the models and the config that a test gives it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.service_harness import wait_until

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def service_process(folder: Path, models: Path, config: Path, trace: Path | None = None) -> Iterator[httpx.Client]:
    """A client of it, once it is ready; it has to end well afterwards. Its log is written into ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = {
        "--port": str(port),
        "--models": str(models),
        "--config": str(config),
        "--validation-threshold": "0",
        "--log-file": str(folder / "log"),
    }
    if trace is not None:
        arguments["--profile-trace"] = str(trace)
    flat = [part for pair in arguments.items() for part in pair]
    command = [sys.executable, "-m", "generation.serve_competitive", *flat]
    with (
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client,
    ):
        try:
            wait_until(lambda: _status(client) not in ("", "loading"), 300)
            assert _status(client) == "ready", (folder / "log").read_text()
            yield client
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def _status(client: httpx.Client) -> str:
    try:
        return str(client.get("/health").json()["status"])
    except httpx.TransportError:
        return ""
