"""A request's life: admission, waiting, cancelling, failing, ending. Over real HTTP where a client is part of it."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from generation.engine import engine as engine_module
from generation.engine.engine import DeadlineExceeded, Engine, StageFailed, Unavailable
from generation.pipeline.job import Job
from tests.support.service_harness import (
    PATIENCE_S,
    Service,
    StandInPipeline,
    ask,
    hold,
    in_thread,
    request_of,
    serving,
    wait_until,
)
from tests.support.waiting import until


def send_and_keep_open(service: Service, prompt: str) -> socket.socket:
    """A client of whom the connection is in our hands."""
    host, port = service.url.removeprefix("http://").split(":")
    body = f"prompt={prompt}"
    client = socket.create_connection((host, int(port)))
    client.sendall(
        f"POST /generate/ HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    return client


def test_while_loading_health_answers_and_generation_says_when_to_return() -> None:
    proceed = threading.Event()

    def load(pipeline: StandInPipeline, progress: Callable[[str], None]) -> StandInPipeline:
        progress("text_to_image")
        assert proceed.wait(PATIENCE_S)
        return pipeline

    with serving(load) as service:
        wait_until(lambda: service.engine.reason == "text_to_image")
        health = service.client.get("/health")
        assert health.status_code == 200
        assert (health.json()["status"], health.json()["reason"]) == ("loading", "text_to_image")
        refused = service.generate()
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert "text_to_image" in refused.json()["error"]["message"]
        proceed.set()
        wait_until(lambda: service.client.get("/health").json()["status"] == "ready")
        assert service.generate().status_code == 200


def test_a_failed_load_is_told_and_does_not_end_the_service() -> None:
    def load(pipeline: StandInPipeline, progress: Callable[[str], None]) -> StandInPipeline:
        raise OSError("clip: open_clip_model.safetensors is missing")

    with serving(load) as service:
        wait_until(lambda: service.engine.status == "failed")
        assert "open_clip_model.safetensors is missing" in service.client.get("/health").json()["reason"]
        refused = service.generate()
        assert refused.status_code == 503
        assert "Retry-After" not in refused.headers


def test_a_full_queue_refuses_with_a_time_and_recovers() -> None:
    with serving(max_queue=2) as service:
        held = hold(service)
        waiting = [in_thread(lambda: httpx.post(service.url + "/generate/", data={"prompt": "a"})) for _ in "12"]
        wait_until(lambda: service.engine.queue_depth == 2)
        refused = service.generate()
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert service.client.get("/health").json()["totals"]["refused"] == 1
        service.pipeline.go.set()
        for thread, results in [held, *waiting]:
            thread.join(PATIENCE_S)
            assert results[0].status_code == 200
        assert service.generate().status_code == 200


def gave_up(engine: Engine, count: int) -> bool:
    return engine.totals["cancelled"] == count and not engine.active


def test_when_to_return_follows_generations_and_not_hang_ups() -> None:
    with serving(max_queue=1) as service:
        for _ in range(20):
            service.generate()  # of 1.75 s, as their reports say
        for count in range(1, 6):
            client = send_and_keep_open(service, "hold")
            wait_until(lambda: service.engine.active)
            client.close()
            wait_until(partial(gave_up, service.engine, count))
        assert service.generate("crash").status_code == 500
        hold(service)
        ask(service, "a", "interactive")
        wait_until(lambda: service.engine.queue_depth == 1)
        assert int(service.generate().headers["Retry-After"]) == 2


def test_a_client_that_hangs_up_while_waiting_frees_its_place() -> None:
    with serving(max_queue=1) as service:
        hold(service)
        client = send_and_keep_open(service, "gone")
        wait_until(lambda: service.engine.queue_depth == 1)
        assert service.generate().status_code == 503
        client.close()
        wait_until(lambda: service.engine.queue_depth == 0)
        thread, results = in_thread(service.generate)
        wait_until(lambda: service.engine.queue_depth == 1)
        service.pipeline.go.set()
        thread.join(PATIENCE_S)
        assert results[0].status_code == 200
        assert "gone" not in [request.prompt for request in service.pipeline.started]
        assert service.engine.totals["cancelled"] == 1


def test_a_client_that_hangs_up_while_it_runs_stops_the_work() -> None:
    with serving() as service:
        client = send_and_keep_open(service, "hold")
        wait_until(lambda: service.engine.active)
        active = service.client.get("/health").json()["active"]
        assert (active[0]["stage"], active[0]["fraction"]) == ("text_to_image", 0.5)
        client.close()
        wait_until(lambda: service.pipeline.cancelled == ["hold"])
        assert service.generate().status_code == 200
        assert service.engine.totals["cancelled"] == 1


def test_a_stopping_server_tells_its_clients_and_ends_the_work() -> None:
    with serving() as service:
        held, results = hold(service)
        service.server.should_exit = True
        held.join(PATIENCE_S)
        assert results[0].status_code == 503
        assert "shutting down" in results[0].json()["error"]["message"]
        wait_until(lambda: service.pipeline.cancelled == ["hold"])


@pytest.mark.parametrize("prompt", ["crash", "exit"])
def test_a_stage_that_fails_fails_its_request_alone(prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as service:
        failed = service.generate(prompt)
        assert failed.status_code == 500
        assert failed.json()["error"]["field"] is None
        assert "Retry-After" not in failed.headers
        assert service.generate().status_code == 200
        assert service.engine.totals["failed"] == 1
    assert any(message.startswith("Generation failed: ") for message in caplog.messages)


def test_requests_join_between_ticks_up_to_the_batch() -> None:
    with serving(max_queue=8, max_batch=3) as service:
        held, results = hold(service)
        for prompt, status in (("a", 200), ("crash", 500), ("b", 200)):  # each comes and goes while the first runs on
            assert service.generate(prompt).status_code == status
        assert service.client.get("/health").json()["active"][0]["stage"] == "text_to_image"
        others = [hold(service) for _ in range(3)]
        wait_until(lambda: len(service.engine.active) == 3 and service.engine.queue_depth == 1)
        service.pipeline.go.set()
        for thread, answers in [(held, results), *others]:
            thread.join(PATIENCE_S)
            assert answers[0].status_code == 200
        ticks = service.pipeline.ticks
        assert ["hold", "crash"] in ticks
        assert max(map(len, ticks)) == 3
        counted = service.engine.health()[0]["ticks"]
        assert counted == {str(size): sum(len(tick) == size for tick in ticks) for size in (1, 2, 3)}


def test_full_memory_lets_fewer_join() -> None:
    with serving(max_queue=8, max_batch=3) as service:
        service.pipeline.limit = SimpleNamespace(current=1)
        held = [hold(service) for _ in range(2)]
        wait_until(lambda: len(service.engine.active) == 1 and service.engine.queue_depth == 1)
        assert service.engine.health()[0]["at_once"] == 1
        service.pipeline.go.set()
        for thread, answers in held:
            thread.join(PATIENCE_S)
            assert answers[0].status_code == 200
        assert max(map(len, service.pipeline.ticks)) == 1


async def test_a_request_that_takes_too_long_ends_at_its_deadline(
    ready_engine: tuple[Engine, StandInPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pipeline = ready_engine
    monkeypatch.setattr(engine_module, "TIMEOUT_S", 0.05)
    with pytest.raises(DeadlineExceeded):
        await engine.generate(request_of("hold"))
    await asyncio.to_thread(wait_until, lambda: pipeline.cancelled == ["hold"])
    monkeypatch.undo()
    assert (await engine.generate(request_of("a"))).ply == b"ply\na 1"


async def test_stopping_ends_what_runs_and_what_waits(ready_engine: tuple[Engine, StandInPipeline]) -> None:
    engine, pipeline = ready_engine
    tasks = [asyncio.create_task(engine.generate(request_of(prompt))) for prompt in ("hold", "a")]
    await until(lambda: engine.active)
    await asyncio.to_thread(engine.stop, PATIENCE_S)
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    assert not engine._thread.is_alive()
    assert pipeline.started[1:] == []
    with pytest.raises(Unavailable):
        await engine.generate(request_of("b"))


async def test_calls_give_back_a_value_error_and_wrap_the_rest(ready_engine: tuple[Engine, StandInPipeline]) -> None:
    engine, _ = ready_engine
    assert await engine.call(lambda pipeline: len(pipeline.models)) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        await engine.call(lambda pipeline: int("x"))
    with pytest.raises(StageFailed, match="ZeroDivisionError"):
        await engine.call(lambda pipeline: 1 // 0)
    assert await engine.call(lambda pipeline: 2) == 2


async def test_a_tick_that_breaks_fails_what_it_carried_and_nothing_else(
    ready_engine: tuple[Engine, StandInPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, pipeline = ready_engine
    monkeypatch.setattr(pipeline, "tick", lambda jobs: 1 // 0)
    with pytest.raises(StageFailed, match="ZeroDivisionError"):
        await engine.generate(request_of("a"))
    monkeypatch.undo()
    assert (await engine.generate(request_of("a"))).ply == b"ply\na 1"


async def test_a_thread_that_breaks_leaves_nobody_waiting(
    ready_engine: tuple[Engine, StandInPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the machine's memory is full, outside of a tick: so its process is started again."""
    engine, pipeline = ready_engine

    def full(*_: Any) -> Job:
        raise MemoryError("none left")

    held = asyncio.create_task(engine.generate(request_of("hold")))
    await until(lambda: engine.active)
    waiting = asyncio.create_task(engine.generate(request_of("a")))
    monkeypatch.setattr(pipeline, "begin", full)
    pipeline.go.set()
    assert (await held).ply == b"ply\nhold 1"
    with pytest.raises(Unavailable, match="MemoryError: none left"):
        await asyncio.wait_for(waiting, PATIENCE_S)
    assert (engine.status, engine.reason) == ("failed", "the engine broke: MemoryError: none left")
    with pytest.raises(Unavailable, match="the engine broke"):
        await engine.generate(request_of("b"))


async def test_progress_is_told_and_health_says_what_runs(ready_engine: tuple[Engine, StandInPipeline]) -> None:
    engine, pipeline = ready_engine
    told: list[tuple[str, float]] = []
    running = asyncio.create_task(engine.generate(request_of("hold", seed=7), lambda *progress: told.append(progress)))
    await until(lambda: told)
    entry = engine.health()[0]
    assert (entry["device"], entry["name"], entry["status"], entry["queue_depth"]) == ("cpu", "CPU", "ready", 0)
    assert entry["active"] == [{"seed": 7, "priority": "interactive", "stage": "text_to_image", "fraction": 0.5}]
    assert entry["memory"] is None
    json.dumps(entry, allow_nan=False)  # it goes over a process border, and to clients
    pipeline.go.set()
    asset = await running
    assert (told[0], told[-1]) == (("text_to_image", 0.5), ("dreamgaussian", 0.25))
    assert asset.report.device == "cpu"
    assert engine.health()[0]["active"] == []


async def test_health_tells_the_memory_after_the_latest_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is stood in for: there is none here."""
    measured = iter(range(1, 10))
    monkeypatch.setattr(engine_module.gpu_memory, "device_name", lambda device: f"the card {device}")
    monkeypatch.setattr(engine_module.gpu_memory, "measure", lambda device: {"used_bytes": next(measured)})
    engine = Engine(lambda progress: StandInPipeline(), max_queue=1, max_batch=1, device="cuda")
    engine.start()
    await asyncio.to_thread(wait_until, lambda: engine.status == "ready")
    entry = engine.health()[0]
    assert (entry["device"], entry["name"], entry["memory"]) == ("cuda:0", "the card cuda:0", {"used_bytes": 1})
    asset = await engine.generate(request_of("a"))
    assert asset.report.device == "cuda:0"
    assert engine.health()[0]["memory"] == {"used_bytes": 2}
    engine.stop(PATIENCE_S)


def test_a_client_that_hangs_up_stops_all_its_candidates() -> None:
    with serving(max_batch=4) as service:
        client = send_and_keep_open(service, "hold&candidates=3")
        wait_until(lambda: len(service.engine.active) == 3)
        client.close()
        wait_until(lambda: len(service.pipeline.cancelled) == 3)
        assert service.generate().status_code == 200


def test_a_client_that_hangs_up_while_it_sends_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as service:
        host, port = service.url.removeprefix("http://").split(":")
        with httpx.stream("GET", service.url + "/events/mine", timeout=PATIENCE_S) as events:
            with socket.create_connection((host, int(port))) as client:
                client.sendall(
                    b"POST /generate/ HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: mine\r\n"
                    b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 50\r\n\r\nprompt="
                )
            told = [line for line in events.iter_lines() if line.startswith("data:")]
        assert json.loads(told[-1].removeprefix("data:"))["reason"] == "the client hung up"
    assert "Exception in ASGI application" not in caplog.text


class TestMemory:
    """What is over is freed at once. The garbage collector is off: it comes late for objects that lived for seconds."""

    @pytest.fixture(autouse=True)
    def no_collector(self) -> Iterator[None]:
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    async def test_a_result_is_freed_with_its_answer(self, ready_engine: tuple[Engine, StandInPipeline]) -> None:
        engine, _ = ready_engine
        asset = await engine.generate(request_of("a"))
        scores = await engine.call(lambda pipeline: pipeline.validate(b"ply", "a", False, False, 0.6))
        kept: list[weakref.ref[Any]] = [weakref.ref(asset), weakref.ref(scores)]
        del asset, scores
        await until(lambda: [each() for each in kept] == [None, None])

    @pytest.mark.parametrize("way", ["cancelled", "failed", "broken", "call"])
    async def test_what_a_request_held_is_freed_when_it_ends_early(
        self, way: str, ready_engine: tuple[Engine, StandInPipeline], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine, pipeline = ready_engine
        monkeypatch.setattr(engine_module.log, "disabled", True)  # pytest keeps what is logged, and tracebacks with it
        kept: list[weakref.ref[Any]] = []

        class Held:
            """In the place of tensors."""

        def fail(job: Job | None) -> None:
            held = Held()
            kept.append(weakref.ref(held))
            if job is None or way != "cancelled":
                raise RuntimeError("it broke")
            job.advance("dreamgaussian", 0.5)

        def tick(jobs: list[Job]) -> None:
            for job in jobs:
                job.work = Held()  # type: ignore[assignment]
                kept.append(weakref.ref(job.work))
                if way == "broken":
                    fail(job)
                try:
                    fail(job)
                except Exception as error:
                    job.outcome = error

        monkeypatch.setattr(pipeline, "tick", tick)
        asked = engine.call(lambda _: fail(None)) if way == "call" else engine.generate(request_of("a"))
        task = asyncio.ensure_future(asked)
        await until(lambda: kept)
        if way == "cancelled":
            task.cancel()
        await asyncio.wait([task])
        del task, asked
        await until(lambda: not any(each() for each in kept))
