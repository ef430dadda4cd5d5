"""An engine in a process on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from generation.fleet import remote
from generation.fleet.messages import Channel, Start
from generation.fleet.remote import NotStarted, RemoteEngine


class ProcessEngine(RemoteEngine):
    """An engine in a child process, which ends with the service.

    With a ``device`` "cuda:N", as this process counts its GPUs, the child sees only that GPU. Any other name changes
    nothing.
    """

    silent_checks = 30

    def __init__(self, device: str, settings: Any, loader: str, changed: Callable[[], None]) -> None:
        super().__init__(device, None, settings.models.max_batch, changed)
        self.memory_class = getattr(settings, "memory_class", None)
        self._start = Start(settings, loader)
        self._process: subprocess.Popen[bytes]

    def _launch(self) -> Channel:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # no descriptor is left
            raise NotStarted(error) from error
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-m", "generation.fleet.worker", str(number), str(os.getpid())]
            try:  # on this thread, with which the process will end: see generation.fleet.worker.die_with
                self._process = subprocess.Popen(
                    command, pass_fds=[number], stdin=subprocess.DEVNULL, env=_environment(self.device)
                )
            except OSError as error:
                ours.close()
                raise NotStarted(error) from error
        channel = Channel(ours)
        channel.send(self._start)
        return channel

    def _has_ended(self) -> bool:
        return self._process.poll() is not None

    async def _finish(self) -> None:
        end = time.monotonic() + remote.ENDING_S
        while self._process.poll() is None:
            if time.monotonic() >= end:
                self._process.kill()
            await asyncio.sleep(0.02)

    def _cause(self) -> str:
        status = self._process.returncode
        if status < 0:
            return f"its process was killed by {signal.Signals(-status).name}"
        return f"its process ended with exit status {status}"


def _environment(device: str) -> dict[str, str]:
    """This process's environment, with ``device`` as the only visible GPU."""
    environment = dict(os.environ)
    kind, _, index = device.partition(":")
    if kind == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index
    return environment
