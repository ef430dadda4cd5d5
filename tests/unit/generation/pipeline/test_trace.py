"""--profile-trace, with real work for PyTorch's profiler to see."""

from __future__ import annotations

import gc
import gzip
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from generation.pipeline.job import Asset, Cancelled, Job, Report, Request
from generation.pipeline.trace import FIRST_TICKS, Traced

TICKS = FIRST_TICKS + 5


class Multiplying:
    """A pipeline that multiplies matrices of the tick's number, so that a trace tells the ticks apart."""

    models = ("stand-in",)

    def tick(self, jobs: list[Job]) -> None:
        for job in jobs:
            work: Any = job.work or SimpleNamespace(iteration=0, done=False)
            job.work = work
            work.iteration += 1
            side = work.iteration
            torch.full((side, side), 1.0).mm(torch.full((side, side), 2.0))
            work.done = work.iteration == TICKS - 1
            if job.cancelled():
                job.outcome = Cancelled("given up")
            elif work.iteration == TICKS:
                job.outcome = Asset(b"ply", job.report)


def new_job(cancelled: Callable[[], bool] = lambda: False) -> Job:
    return Job(Request(prompt="a", seed=1, threshold=0.6), lambda stage, fraction: None, cancelled, Report(1))


def run(pipeline: Any, job: Job, ticks: int = TICKS) -> None:
    for _ in range(ticks):
        assert job.outcome is None
        pipeline.tick([job])
    assert job.outcome is not None


def names(path: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


def ticks_in(path: Path) -> list[int]:
    """Numbers of the ticks of which there is a trace, by their labels; each has its multiplication."""
    found = names(path)
    numbers = sorted({int(name.split()[1]) for name in found if name.startswith("tick ")})
    assert found.count("aten::mm") == len(numbers)
    return numbers


def test_the_first_request_is_traced_its_middle_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trace.json.gz"
    pipeline = Traced(Multiplying(), path)
    assert pipeline.models == ("stand-in",)
    caplog.set_level("INFO")
    run(pipeline, new_job())
    assert ticks_in(path) == [*range(1, FIRST_TICKS + 1), TICKS]
    assert any(str(path) in message and "MB" in message for message in caplog.messages)
    before = path.read_bytes()
    run(pipeline, new_job())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_runs_while_the_first_request_is_paused_is_left_out(tmp_path: Path) -> None:
    paused: list[int] = []
    first, second = new_job(), new_job()
    first.paused = lambda: bool(paused)
    pipeline = Traced(Multiplying(), tmp_path / "trace")
    pipeline.tick([first])
    paused.append(1)
    pipeline.tick([second])
    paused.clear()
    run(pipeline, first, TICKS - 1)
    assert ticks_in(tmp_path / "trace") == [1, *range(3, FIRST_TICKS + 1), TICKS + 1]


def test_the_first_request_is_not_kept(tmp_path: Path) -> None:
    pipeline, job = Traced(Multiplying(), tmp_path / "trace"), new_job()
    run(pipeline, job)
    kept = weakref.ref(job)
    del job
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("lasted", [3, FIRST_TICKS + 2])
def test_a_first_request_that_is_given_up_is_traced_so_far(tmp_path: Path, lasted: int) -> None:
    path = tmp_path / "trace"  # compressed whatever its name
    job: Any = new_job(lambda: job.work.iteration == lasted)
    run(Traced(Multiplying(), path), job, lasted)
    assert ticks_in(path) == list(range(1, min(lasted, FIRST_TICKS) + 1))


def test_a_first_request_that_is_put_back_is_traced_on(tmp_path: Path) -> None:
    """For which memory was full beside others: it has lost its work when its turn comes again."""
    job, pipeline = new_job(), Traced(Multiplying(), tmp_path / "trace.gz")
    for _ in range(FIRST_TICKS + 2):
        pipeline.tick([job])
    job.work = None
    run(pipeline, job)
    assert FIRST_TICKS + 3 in ticks_in(tmp_path / "trace.gz")  # its first one anew


def test_a_tick_that_breaks_ends_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Traced(Multiplying(), tmp_path / "trace")
    with monkeypatch.context() as broken:
        broken.setattr(Multiplying, "tick", lambda self, jobs: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.tick([new_job()])
    assert "tick 1 of 1 requests" in names(tmp_path / "trace")
    run(pipeline, new_job())  # as ever, untraced


def test_a_trace_that_can_not_be_written_ends_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(Traced(Multiplying(), tmp_path / "missing" / "trace"), new_job())
    assert any("No trace of the first request" in message for message in caplog.messages)
