"""Interactive requests go before those in the background, and candidates before nobody's request."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from functools import partial
from typing import Any

import httpx
import pytest

from generation.engine import engine as engine_module
from generation.engine.engine import Engine, StageFailed
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


def test_what_a_person_asks_for_pauses_the_background() -> None:
    with serving(max_batch=2) as service:
        paused = hold(service, "background")
        first = hold(service)
        wait_until(lambda: len(service.engine.active) == 2)
        wait_until(lambda: service.engine.active[0]["stage"] == "paused")
        assert [each["priority"] for each in service.client.get("/health").json()["active"]] == [
            "background",
            "interactive",
        ]
        assert service.generate("b").status_code == 200  # beside the first: what is paused takes no place
        assert "generation_paused_requests" in service.client.get("/metrics").text
        service.pipeline.go.set()
        for thread, answers in (paused, first):
            thread.join(PATIENCE_S)
            assert answers[0].status_code == 200
        together = [tick for tick in service.pipeline.ticks if len(tick) > 1]
        assert together == [["hold", "b"]]
        assert all("paused" not in json.loads(answers[0].headers["X-Seconds"]) for _, answers in (paused, first))


def is_taken(service: Service, before: int, answers: list[Any]) -> bool:
    """Whether a request waits now; or is answered, which it should not be."""
    return service.engine.queue_depth > before or bool(answers)


@pytest.mark.parametrize("order", [("background", "interactive"), ("interactive", "background")])
def test_what_a_person_asks_for_is_begun_first_and_each_has_room_of_its_own(order: tuple[str, str]) -> None:
    with serving(max_queue=1) as service:
        held = [hold(service)]
        for priority in order:
            before = service.engine.queue_depth
            held.append(waiting := ask(service, priority, priority))
            wait_until(partial(is_taken, service, before, waiting[1]))
            refused = service.client.post("/generate/", data={"prompt": "d"}, headers={"X-Priority": priority})
            assert refused.status_code == 503
            assert "queue full" in refused.text
        assert service.engine.queue_depth == 2
        service.pipeline.go.set()
        for thread, answers in held:
            thread.join(PATIENCE_S)
            assert answers[0].status_code == 200
        assert [request.prompt for request in service.pipeline.started] == ["hold", "interactive", "background"]


async def test_calls_in_the_background_wait_for_generations_of_persons(
    ready_engine: tuple[Engine, StandInPipeline],
) -> None:
    engine, pipeline = ready_engine
    held = asyncio.create_task(engine.generate(request_of("hold")))
    await until(lambda: engine.active)
    order: list[str] = []
    waits = asyncio.create_task(engine.call(lambda _: order.append("background"), background=True))
    await engine.call(lambda _: order.append("interactive"))
    pipeline.go.set()
    await asyncio.gather(held, waits)
    assert order == ["interactive", "background"]


async def test_what_breaks_a_person_s_tick_leaves_what_is_paused_alone(
    ready_engine: tuple[Engine, StandInPipeline],
) -> None:
    engine, pipeline = ready_engine
    miners = asyncio.create_task(engine.generate(request_of("hold", background=True)))
    await until(lambda: engine.active)
    with pytest.raises(StageFailed):
        await engine.generate(request_of("exit"))
    pipeline.go.set()
    assert (await miners).ply


@pytest.mark.parametrize("comes", ["generation", "call"])
async def test_what_comes_while_a_tick_is_under_way_pauses_the_rest_of_it(
    ready_engine: tuple[Engine, StandInPipeline], comes: str
) -> None:
    engine, pipeline = ready_engine
    tick, under_way, paused = pipeline.tick, threading.Event(), []

    def first(jobs: list[Any]) -> None:
        pipeline.tick = tick  # type: ignore[method-assign]
        paused.append(jobs[0].paused())
        under_way.set()
        wait_until(lambda: engine.queue_depth)
        paused.append(jobs[0].paused())
        tick(jobs)

    pipeline.tick = first  # type: ignore[method-assign]
    background = asyncio.create_task(engine.generate(request_of("a", background=True)))
    await asyncio.to_thread(under_way.wait, PATIENCE_S)
    if comes == "call":
        assert await engine.call(lambda _: len(pipeline.ticks)) == 1  # the one that did nothing any more
    else:
        assert (await engine.generate(request_of("b"))).ply
    assert (await background).ply
    assert paused == [False, True]
    assert [tick for tick in pipeline.ticks if tick] == ([["a"]] if comes == "call" else [["b"], ["a"]])


async def test_the_background_has_no_deadline(
    ready_engine: tuple[Engine, StandInPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task must not be lost because a person asked for something meanwhile."""
    engine, pipeline = ready_engine
    monkeypatch.setattr(engine_module, "TIMEOUT_S", 0.0)
    held = asyncio.create_task(engine.generate(request_of("hold", background=True)))
    await until(lambda: engine.active)
    assert pipeline.started[0].deadline is None
    pipeline.go.set()
    assert (await held).ply


def test_an_unknown_priority_is_refused() -> None:
    with serving() as service:
        refused = service.client.post("/generate/", data={"prompt": "a"}, headers={"X-Priority": "urgent"})
        assert (refused.status_code, refused.json()["error"]["field"]) == (422, "X-Priority")
        assert refused.json()["error"]["limit"] == ["interactive", "background"]


def test_scoring_in_the_background_keeps_nobody_s_scoring_waiting() -> None:
    """It waits for the end of a person's generation, and there are only so many bodies at once."""
    body = {"prompt": "a cube", "data": base64.b64encode(b"ply").decode()}

    def score(priority: str) -> httpx.Response:
        url, headers = service.url + "/validate_txt_to_3d_ply/", {"X-Priority": priority}
        return httpx.post(url, json=body, headers=headers, timeout=5)

    with serving() as service:
        held, _ = hold(service)
        waiting = [in_thread(lambda: score("background"))[0] for _ in range(2)]
        wait_until(lambda: service.engine.queue_depth == 2)
        assert score("interactive").status_code == 200
        assert service.engine.queue_depth == 2
        service.pipeline.go.set()
        for thread in (held, *waiting):
            thread.join(PATIENCE_S)


def test_candidates_in_the_background_do_not_delay_a_person() -> None:
    with serving(max_batch=2) as service:
        form, headers = {"prompt": "hold", "candidates": "64"}, {"X-Priority": "background"}
        many = in_thread(lambda: httpx.post(service.url + "/generate/", data=form, headers=headers, timeout=60))
        wait_until(lambda: service.engine.active)
        for _ in range(3):
            assert service.generate("a person's").status_code == 200
        assert not any("a person's" in tick and "hold" in tick for tick in service.pipeline.ticks)
        service.pipeline.go.set()
        many[0].join(PATIENCE_S)
        assert len(json.loads(many[1][0].headers["X-Scores"])) == 64


def test_what_would_take_no_place_of_others() -> None:
    with serving(max_batch=3) as service:
        assert service.engine.spare() == 2
        held = hold(service)
        assert (service.engine.spare(), service.engine.spare(background=True)) == (1, 0)
        service.pipeline.go.set()
        held[0].join(PATIENCE_S)
    with serving(max_batch=1) as service:
        assert service.engine.spare(background=True) == 1
        held = hold(service, "background")
        wait_until(lambda: service.engine.spare(background=True) == 0)
        assert service.engine.spare() == 1
        service.pipeline.go.set()
        held[0].join(PATIENCE_S)
