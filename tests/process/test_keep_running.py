"""The keeper around each deployed process: what ends it, what is run again, and what does not outlive it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
KEEPER = """
import sys
from scripts.ops import keep_running
keep_running.FIRST_PAUSE_S, keep_running.MAX_OUTPUT_BYTES = float(sys.argv[1]), 1000
keep_running.OUTPUT_CHECK_S = 0.02
sys.exit(keep_running.main(*sys.argv[2:]))
"""
# Notes each life with its PID, then does what the file `way` says; SIGTERM ends it with status 7.
COMMAND = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
with open("lives", "a") as lives: lives.write(f"{os.getpid()}\\n")
way = pathlib.Path("way").read_text()
print("life" * 100, flush=True)
if way == "wait": time.sleep(1000)
while way == "talk": print("life" * 10, flush=True); time.sleep(0.001)
sys.exit(int(way))
"""


class Kept:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes]

    def start(self, way: str, up: bool = True, pause: float = 0.01, python: str = sys.executable) -> None:
        (self.folder / "way").write_text(way)
        if up:
            (self.folder / "up").touch()
        command = [sys.executable, "-c", KEEPER, str(pause), "up", "log", python, "-c", COMMAND]
        with (self.folder / "out").open("wb") as out:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=out, env={"PYTHONPATH": str(ROOT)})

    def ended(self) -> int:
        return self.process.wait(PATIENCE_S)

    @property
    def lives(self) -> list[int]:
        path = self.folder / "lives"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    @property
    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path)
    yield kept
    kept.process.kill()
    kept.process.wait()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_never_started_is_not_run_again(kept: Kept) -> None:
    kept.start("3", up=False)
    assert kept.ended() == 3
    assert len(kept.lives) == 1
    assert kept.log == []


def test_its_own_success_ends_it(kept: Kept) -> None:
    kept.start("0")
    assert kept.ended() == 0
    assert len(kept.lives) == 1
    assert kept.log == []


def test_a_crash_is_followed_by_another_life_and_a_line(kept: Kept) -> None:
    kept.start("wait")
    until(lambda: len(kept.lives) == 1)
    psutil.Process(kept.lives[0]).kill()
    until(lambda: len(kept.lives) == 2)
    assert len(kept.log) == 1
    assert kept.log[0].endswith("ERROR   keep_running: The process ended (SIGKILL); it is started again in 0 s")


def test_later_and_later_and_with_bounded_output(kept: Kept) -> None:
    kept.start("3", pause=0.05)
    until(lambda: len(kept.lives) == 5)
    kept.process.terminate()
    kept.ended()
    began = [line.split(" ERROR")[0] for line in kept.log]
    assert began == sorted(began)
    assert "(exit status 3)" in kept.log[0]
    assert (kept.folder / "out").stat().st_size < 3000


def test_one_long_life_that_talks_has_bounded_output_too(kept: Kept) -> None:
    kept.start("talk")
    out, largest, emptied = kept.folder / "out", 0, 0
    before = 0
    end = time.monotonic() + PATIENCE_S
    while emptied < 3:
        assert time.monotonic() < end
        size = out.stat().st_size
        emptied += size < before
        before, largest = size, max(largest, size)
        time.sleep(0.002)
    assert largest < 20_000
    assert len(kept.lives) == 1


def test_a_signal_is_passed_on_and_nothing_is_run_again(kept: Kept) -> None:
    kept.start("wait")
    until(lambda: len(kept.lives) == 1)
    kept.process.send_signal(signal.SIGTERM)
    assert kept.ended() in (7, 128 + signal.SIGTERM)  # the second before the command had its handler
    assert len(kept.lives) == 1
    assert kept.log == []


def test_a_signal_in_the_pause_ends_it_at_once(kept: Kept) -> None:
    kept.start("3", pause=1000.0)
    until(lambda: kept.log)
    kept.process.send_signal(signal.SIGTERM)
    assert kept.ended() == 0
    assert len(kept.lives) == 1


def test_nothing_outlives_a_keeper_that_is_killed(kept: Kept) -> None:
    kept.start("wait")
    until(lambda: len(kept.lives) == 1)
    child = psutil.Process(kept.lives[0])
    kept.process.kill()
    child.wait(PATIENCE_S)


def test_a_log_that_can_not_be_written_stops_nothing(kept: Kept) -> None:
    (kept.folder / "log").mkdir()
    kept.start("3")
    until(lambda: len(kept.lives) == 2)


def test_a_full_disk_stops_nothing(kept: Kept) -> None:
    for name in ("log", "out"):
        (kept.folder / name).symlink_to("/dev/full")
    kept.start("3")
    until(lambda: len(kept.lives) == 3)


def test_what_can_not_be_started_for_a_while_is_tried_again(kept: Kept) -> None:
    python = kept.folder / "python"  # of an environment that is being made anew
    python.symlink_to(sys.executable)
    kept.start("wait", python=str(python))
    until(lambda: len(kept.lives) == 1)
    python.unlink()
    psutil.Process(kept.lives[0]).kill()
    until(lambda: len(kept.log) >= 2)
    assert "The process could not be started ([Errno 2] No such file or directory" in kept.log[1]
    python.symlink_to(sys.executable)
    until(lambda: len(kept.lives) == 2)
