"""Runs a command, and runs it again when it crashes: what deploy_competitive.sh puts around each of its processes.

keep_running.py UP LOG COMMAND...    exit status: the command's

Until the file UP is there the command is still being started, and its end is ours: whoever starts it sees to that. From
then on it is run again, soon at first and later and later while it does not last, with a line in LOG for each time.
SIGTERM and SIGINT are passed on and end both; so does the command's own success. When this process is killed, the
command is, too. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

FIRST_PAUSE_S = 2.0
MAX_PAUSE_S = 60.0
LASTING_S = 60.0  # a life that lasted so long was no failed start
MAX_OUTPUT_BYTES = 1 << 20  # of what the command prints beside its log, over all lives; looked at every OUTPUT_CHECK_S
OUTPUT_CHECK_S = 10.0
CAN_NOT_START = 127  # a shell's exit status for it

_PR_SET_PDEATHSIG = 1


class Keeper:
    def __init__(self, up: Path, log: Path, command: list[str]) -> None:
        self._up, self._log, self._command = up, log, command
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    def stop(self, *_: Any) -> None:
        """Ends the command, and with it ``run``. A signal handler."""
        self._stopping.set()
        if self._child is not None:
            self._child.terminate()

    def run(self) -> int:
        """The exit status; 128 + N where signal N killed the command, as in a shell."""
        pause = FIRST_PAUSE_S
        while True:
            began = time.monotonic()
            status, how = self._live()
            if self._stopping.is_set() or status == 0 or not self._up.exists():
                return status if status >= 0 else 128 - status
            if time.monotonic() - began >= LASTING_S:
                pause = FIRST_PAUSE_S
            self._say(f"The process {how}; it is started again in {pause:.0f} s")
            if self._stopping.wait(pause):
                return 0
            pause = min(2 * pause, MAX_PAUSE_S)

    def _live(self) -> tuple[int, str]:
        """One life of the command: its exit status, negative for a signal, and how it ended.

        Raises OSError when it can not be started while whoever starts it waits for it.
        """
        try:
            self._child = subprocess.Popen(self._command, preexec_fn=_die_with_parent)
        except OSError as error:  # no memory for a process, or .venv is being made anew
            if not self._up.exists():
                raise
            return CAN_NOT_START, f"could not be started ({error})"
        if self._stopping.is_set():  # while it was being started
            self._child.terminate()
        status = self._child.wait()
        return status, f"ended ({f'exit status {status}' if status >= 0 else signal.Signals(-status).name})"

    def _say(self, text: str) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f",{int(now % 1 * 1000):03d}"
        try:
            with self._log.open("a") as log:  # its writer is dead, so nobody else writes or rotates it
                log.write(f"{stamp} ERROR   keep_running: {text}\n")
        except OSError as error:
            with contextlib.suppress(OSError):  # a full disk takes that no more than the log
                print(f"{stamp} {text} ({self._log}: {error.strerror})", flush=True)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _empty_when_large(*_: Any) -> None:
    """The file that command and keeper print to; they share their place in it. A signal handler."""
    descriptor = sys.stdout.fileno()
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size > MAX_OUTPUT_BYTES:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)


def main(up: str, log: str, *command: str) -> int:
    keeper = Keeper(Path(up), Path(log), list(command))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, keeper.stop)
    signal.signal(signal.SIGALRM, _empty_when_large)
    signal.setitimer(signal.ITIMER_REAL, OUTPUT_CHECK_S, OUTPUT_CHECK_S)
    try:
        return keeper.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it would kill an interpreter that is ending, without its handlers


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
