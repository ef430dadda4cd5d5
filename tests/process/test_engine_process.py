"""An engine's process and the service that it belongs to: hanging, ending, logging, and both over HTTP."""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from generation.engine.engine import StageFailed
from generation.fleet import process, remote
from generation.fleet.fleet import Fleet
from generation.fleet.worker import LogForwarder, _lost_device
from generation.schema.results import Request
from generation.settings import Settings
from generation.splats import ply
from generation.web import film, scoring
from scripts.bench import virtual_time
from tests.support.fleet_harness import PATIENCE_S, ask, children, fleet_of, pid_of, running, starting, states
from tests.support.service_harness import serving_engine, wait_until
from tests.support.waiting import until

REAL_PATIENCE_S = 400.0  # with real models, on a busy machine
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.05)


@pytest.mark.slow
async def test_a_step_that_never_ends_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STUCK_S", 0.5)
    monkeypatch.setattr(remote, "ENDING_S", 0.1)
    async with running(tmp_path) as fleet:
        before = {child.pid for child in children()}
        request = ask(fleet, f"hang {tmp_path / 'hung'}", 1)
        await until(lambda: any("a step has taken over 0.5 s" in each["reason"] for each in fleet.health()))
        assert (await request).ply.endswith(b" hang 1")  # by the other
        await until(lambda: states(fleet) == ["ready", "ready"])
        assert len({child.pid for child in children()} - before) == 1


async def test_a_start_that_never_ends_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LOADING_S", 1.0)
    monkeypatch.setattr(remote, "CHECK_S", 0.1)
    monkeypatch.setattr(remote, "ENDING_S", 0.1)
    broken = tmp_path / "broken"
    broken.write_text("hang")
    async with starting(tmp_path, ("only",)) as fleet:
        await until(lambda: "it was not ready after 1 s, at:" in fleet.reason)
        monkeypatch.setattr(remote, "LOADING_S", PATIENCE_S)
        broken.unlink()
        await until(lambda: states(fleet) == ["ready"])


async def test_a_loader_that_exits_is_a_failed_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("exit")
    async with starting(tmp_path, ("only",)) as fleet:
        await until(lambda: "loading failed: SystemExit: 3" in fleet.reason)
        broken.unlink()
        await until(lambda: states(fleet) == ["ready"])


async def test_an_engine_that_finds_no_descriptor_is_started_once_there_is_one(tmp_path: Path) -> None:
    async with running(tmp_path, ("only",)) as fleet:
        (engine,) = children()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: "its process can not be started: [Errno 24] Too many open files" in fleet.reason, 20)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await until(lambda: states(fleet) == ["ready"])


@pytest.mark.slow
async def test_a_process_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHECK_S", 0.4)
    monkeypatch.setattr(process.ProcessEngine, "silent_checks", 3)
    monkeypatch.setattr(remote, "ENDING_S", 0.1)
    go = tmp_path / "go"
    async with running(tmp_path) as fleet:
        requests = [ask(fleet, f"hold {go}", seed) for seed in range(2)]
        await until(lambda: len(fleet.active) == 2)
        stopped = children()[0]
        stopped.suspend()
        await until(lambda: any("said nothing" in each["reason"] for each in fleet.health()))
        go.touch()
        assets = await asyncio.gather(*requests)
        assert stopped.pid not in {pid_of(asset) for asset in assets}
        await until(lambda: states(fleet) == ["ready", "ready"])
        assert not psutil.pid_exists(stopped.pid)


@pytest.mark.slow
async def test_a_silent_engine_is_out_of_rotation_before_its_process_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver can keep a process from ending long after it was killed."""
    monkeypatch.setattr(remote, "CHECK_S", 0.4)
    monkeypatch.setattr(process.ProcessEngine, "silent_checks", 3)
    finish, may_end = process.ProcessEngine._finish, asyncio.Event()

    async def late(engine: process.ProcessEngine) -> None:
        await may_end.wait()
        await finish(engine)

    monkeypatch.setattr(process.ProcessEngine, "_finish", late)
    go = tmp_path / "go"
    async with running(tmp_path) as fleet:
        requests = [ask(fleet, f"hold {go}", seed) for seed in range(2)]
        await until(lambda: len(fleet.active) == 2)
        go.touch()
        stopped = children()[0]
        stopped.suspend()
        try:
            # The stand-in may have answered before it was stopped; then nothing is lost and all the same it is out.
            await until(lambda: "failed" in states(fleet))
            assert len(await asyncio.gather(*requests)) == 2
            assert (await ask(fleet, "a")).report.device != fleet.health()[states(fleet).index("failed")]["device"]
            assert psutil.pid_exists(stopped.pid)
        finally:
            may_end.set()
        await until(lambda: states(fleet) == ["ready", "ready"])


def test_a_start_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process imports torch before it can say anything."""
    settings = SimpleNamespace(models=SimpleNamespace(max_batch=1))
    engine = process.ProcessEngine("cuda:0", settings, "", lambda: None)
    monkeypatch.setattr(engine, "_has_ended", lambda: False)

    async def main() -> None:
        watching = asyncio.create_task(engine._watch(asyncio.Event()))
        await asyncio.sleep(300.0)
        assert engine.status == "loading"
        watching.cancel()

    virtual_time.run(main())


def test_pauses_grow_only_while_an_engine_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 5.0)
    settings = SimpleNamespace(models=SimpleNamespace(max_batch=1))
    engine = process.ProcessEngine("cuda:0", settings, "", lambda: None)
    answers = iter([True, True, False, False, False, True, True])
    starts: list[float] = []

    async def live() -> str:
        starts.append(asyncio.get_running_loop().time())
        engine._answered = next(answers)
        return "it broke"

    monkeypatch.setattr(engine, "_run_worker", live)
    with pytest.raises(RuntimeError, match="StopIteration"):
        virtual_time.run(engine.supervise())
    assert [round(b - a) for a, b in itertools.pairwise(starts)] == [5, 5, 10, 20, 40, 5, 5]


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA driver error: unspecified launch failure", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True),
        ("CUDA driver error: out of memory", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        ("shapes do not match", False),
    ],
)
def test_errors_that_a_device_does_not_come_back_from(text: str, lost: bool) -> None:
    wrapped = StageFailed("the stage broke")
    wrapped.__cause__ = RuntimeError(text)
    assert (_lost_device(wrapped) is not None) is lost


def test_a_line_that_can_not_be_made_does_not_fail_its_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    sent: list[Any] = []
    logger = logging.Logger("library")
    logger.addHandler(LogForwarder(SimpleNamespace(send=sent.append)))  # type: ignore[arg-type]
    logger.warning("deprecated", FutureWarning)
    logger.warning("all is well")
    assert [each.record["msg"] for each in sent] == ["all is well"]


async def test_the_processes_log_into_the_services_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running(tmp_path, devices=("only",)) as fleet:
        await ask(fleet, "a")
        with pytest.raises(StageFailed):
            await ask(fleet, "crash")
    records = {record.getMessage(): record for record in caplog.records}
    assert records["CLIP Score: 0.75"].name == "generation.engine[only]"
    trace = records["A request failed"].exc_text
    assert trace is not None
    assert "RuntimeError: the stage broke" in trace
    assert all(line.startswith("    | ") for line in trace.splitlines())


@pytest.mark.slow
async def test_over_http_health_and_metrics_tell_of_each_engine(tmp_path: Path) -> None:
    with serving_engine(fleet_of(tmp_path), 3) as (url, _):
        async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            while (health := (await client.get("/health")).json())["status"] != "ready":
                assert (health["status"], health["totals"]["requests"]) == ("loading", 0)
            go = tmp_path / "go"
            requests = [asyncio.create_task(client.post("/generate/", data={"prompt": f"hold {go}"})) for _ in range(4)]
            while len((await client.get("/health")).json()["active"]) < 4:
                pass
            children()[0].kill()
            while "failed" not in {each["status"] for each in (await client.get("/health")).json()["engines"]}:
                pass
            assert 'generation_engine_up{device="second"}' in (await client.get("/metrics")).text
            go.touch()
            assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}
            while {each["status"] for each in (await client.get("/health")).json()["engines"]} != {"ready"}:
                pass
            body = {"prompt": "a", "data": base64.b64encode(b"x").decode()}
            answer = await client.post("/validate_txt_to_3d_ply/", json=body)
            assert answer.status_code == 422
            assert answer.json()["error"]["message"] == "not a PLY"
    assert children() == []


@pytest.mark.slow
async def test_two_real_engines_of_the_tiny_profile_make_the_same_splat(tmp_path: Path) -> None:
    """On the CPU, in two processes; and what only one of them is asked for, the other makes when that is killed."""
    config = tmp_path / "config.yaml"
    config.write_text("iters: 3\nnum_pts: 7500\nref_size: 64\nrender_size: 64\ninit: ball\ndensity_end_iter: 0\n")
    settings = Settings.resolve({"profile": "tiny", "config": config})
    fleet = Fleet({"cpu a": settings, "cpu b": settings})
    request = Request(prompt="a red cube", seed=7, threshold=0.0)
    fleet.start()
    try:
        async with asyncio.timeout(REAL_PATIENCE_S):
            while states(fleet) != ["ready", "ready"]:
                assert "failed" not in states(fleet), fleet.reason
                await asyncio.sleep(0.1)
            first, second = await asyncio.gather(*(fleet.generate(request) for _ in range(2)))
            assert {first.report.device, second.report.device} == {"cpu a", "cpu b"}
            assert len(ply.read(first.ply)) == first.report.num_gaussians >= 7000
            assert first.ply == second.ply
            scores = await fleet.call(partial(scoring.validate, data=first.ply, compression=0, prompt="a red cube"))
            assert scores.gates
            assert all(gate.passed for gate in scores.gates.values())
            frames = await fleet.call(partial(film.frames, data=first.ply, device="cpu"))
            assert frames[0].shape == (512, 512, 3)
            told: list[str] = []
            again = asyncio.create_task(fleet.generate(request, lambda stage, fraction: told.append(stage)))
            await until(lambda: told)
            children()[0].kill()
            assert (await again).ply == first.ply
    finally:
        await asyncio.to_thread(fleet.stop, PATIENCE_S)


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.support.fleet_harness import ask, children, running
from tests.support.waiting import until

async def main():
    folder = Path(sys.argv[1])
    async with running(folder) as fleet:
        asked = [ask(fleet, f"{sys.argv[2]} {folder / number}") for number in "12"]
        await until(lambda: len(fleet.active) == 2 or len(list(folder.iterdir())) == 2)
        print(*(child.pid for child in children()), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("doing", ["hold", "seize"])
def test_a_killed_service_leaves_no_engines_behind(tmp_path: Path, doing: str) -> None:
    """Whatever they do, even when no thread of theirs can run any more: then a GPU hangs."""
    command = [sys.executable, "-c", PARENT, str(tmp_path), doing]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(psutil.pid_exists, pids))
        for pid in pids:  # a signal to the whole group is for the service to answer
            os.kill(pid, signal.SIGTERM)
        parent.kill()
    try:
        wait_until(lambda: not any(map(alive, pids)))
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """A zombie that nobody has waited for is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_process_sees_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert process._environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert process._environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    assert process._environment("cpu")["CUDA_VISIBLE_DEVICES"] == "5,GPU-7"
