"""The client of a generation service, against small HTTP servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
import uvicorn
from aiohttp import web

from neurons.miner.generation import pool as generators
from neurons.miner.generation import service as service_module
from neurons.miner.generation.pool import GeneratorPool
from neurons.miner.generation.service import (
    AttemptFailed,
    EndpointUnavailable,
    Generated,
    GenerationFailed,
    GenerationService,
)
from neurons.protocol import ImageTask, Task, TextTask
from tests.support.waiting import until

PLY = b"ply, for all that the client knows"

Handler = Callable[[web.Request], Awaitable[web.Response]]


async def serve(handler: Handler) -> tuple[web.AppRunner, str]:
    app = web.Application(client_max_size=1 << 25)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def ask_service(handler: Handler, task: Task) -> Generated:
    runner, url = await serve(handler)
    try:
        async with GenerationService(url) as service:
            generated = await service.generate(task, 5)
            assert generated.endpoint == url
            assert 0 < generated.seconds < 5
            return replace(generated, endpoint="", seconds=0.0)
    finally:
        await runner.cleanup()


async def test_an_idle_connection_is_given_up_before_the_service_closes_it() -> None:
    """A task on one that is just being closed would be lost. The service has uvicorn's default."""
    async with GenerationService("http://127.0.0.1:1") as service:
        connector: Any = service._session and service._session.connector
        assert connector._keepalive_timeout < uvicorn.Config("service").timeout_keep_alive


async def test_a_generated_splat_comes_with_its_score() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.path == "/generate/"
        assert request.headers["X-Priority"] == "background"  # who asks in person goes first
        form = await request.post()
        assert form["prompt"] == "größer"
        assert form["seed"] == "5"
        assert len(form) == 2
        return web.Response(body=PLY, headers={"X-Score": "0.76", "X-Seed": "5"})

    assert await ask_service(handler, TextTask(id="1", prompt="größer")) == Generated(PLY, 0.76, "5", "")


@pytest.mark.parametrize(
    ("header", "scores"),
    [
        ("[[5, 0.7], [9, null], [3, 0.76]]", (0.7, None, 0.76)),
        ("[[5, 0.7], [9, NaN], [3, 0.76], [4, 0.9]]", (0.7, None, 0.76)),  # no more than were asked for
        ("[5, 0.7]", ()),
        ("{", ()),
        ("[" * 4000, ()),
    ],
)
async def test_several_candidates_are_asked_for_and_their_scores_are_read(header: str, scores: Any) -> None:
    async def handler(request: web.Request) -> web.Response:
        form = await request.post()
        assert (form["seed"], form["candidates"], form["budget_seconds"]) == ("5", "3", "4.500")
        return web.Response(body=PLY, headers={"X-Score": "0.76", "X-Seed": "3", "X-Scores": header})

    runner, url = await serve(handler)
    try:
        async with GenerationService(url) as service:
            generated = await service.generate(TextTask(id="1", prompt="p"), 5, 3, 4.5)
    finally:
        await runner.cleanup()
    assert generated.scores == scores
    assert generated.candidates == max(len(scores), 1)
    assert generated.first_score == (scores[0] if scores else 0.76)


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ('{"alignment": 0.81, "iqa": 0.75, "ssim": 0.9, "lpips": null}', {"iqa": 0.75, "alignment": 0.81, "ssim": 0.9}),
        ('{"alignment": NaN, "iqa": [1], "more": 1, "ssim": true, "lpips": "x"}', {}),
        ("[1]", {}),
        ("{", {}),
        ("[" * 4000, {}),
    ],
)
async def test_a_score_comes_with_its_parts(header: str, parts: dict[str, float]) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=PLY, headers={"X-Score": "0.76", "X-Seed": "5", "X-Score-Parts": header})

    assert await ask_service(handler, TextTask(id="1", prompt="p")) == Generated(PLY, 0.76, "5", "", parts=parts)


async def test_a_service_that_refuses_its_name_says_so() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=421, text="the flag --allowed-hosts adds it")

    runner, url = await serve(handler)
    async with GenerationService(url) as service:
        with pytest.raises(EndpointUnavailable, match=r"refuses to answer \(421\): .*--allowed-hosts"):
            await service.health()
    await runner.cleanup()


@pytest.mark.parametrize("body", ["", "[]", "{}", '"ready"', "\xff", "[" * 100_000])
async def test_what_is_no_health_is_no_service(body: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body.encode("latin-1"))

    runner, url = await serve(handler)
    async with GenerationService(url) as service:
        with pytest.raises(EndpointUnavailable, match="not reachable"):
            await service.health()
    await runner.cleanup()


async def test_line_breaks_are_no_reason_to_lose_a_task() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert (await request.post())["prompt"] == "a red cube, on a table"
        return web.Response(body=PLY)

    assert (await ask_service(handler, TextTask(id="1", prompt=" a red\r\ncube,\ton a  table\n"))).ply == PLY


@pytest.mark.parametrize("call", ["health", "generate"])
async def test_an_endpoint_that_takes_no_connection_is_not_there(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is gone without a word: packets are dropped, nothing is refused."""

    async def nobody(*_: object, **__: object) -> object:
        raise aiohttp.ConnectionTimeoutError("Connection timeout to host")

    monkeypatch.setattr(aiohttp.ClientSession, "_request", nobody)
    async with GenerationService("http://10.0.0.1:9") as service:
        with pytest.raises(EndpointUnavailable, match="no connection in time"):
            await (service.health() if call == "health" else service.generate(TextTask(id="1", prompt="p"), 1))


async def test_a_service_that_takes_connections_and_never_answers_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not unreachable: the kernel answers for a process that is frozen."""
    monkeypatch.setattr(service_module, "HEALTH_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with GenerationService(f"http://127.0.0.1:{server.getsockname()[1]}") as service:
            assert await service.health() is None


async def test_a_failed_attempt_says_where_and_for_how_long() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=500)

    with pytest.raises(AttemptFailed) as failed:
        await ask_service(handler, TextTask(id="1", prompt="p"))
    assert failed.value.endpoint.startswith("http://127.0.0.1:")
    assert 0 < failed.value.seconds < 5


async def test_an_image_task_is_uploaded() -> None:
    async def handler(request: web.Request) -> web.Response:
        upload = (await request.post())["prompt_image_file"]
        assert isinstance(upload, web.FileField)
        assert upload.file.read() == b"hi"
        return web.Response(body=b"", headers={"X-Score": "nan", "X-Rejected": "gates"})

    assert await ask_service(handler, ImageTask(id="1", prompt="aGk=")) == Generated(b"", None, "?", "gates")


async def test_a_picture_in_which_nothing_was_found_is_given_up() -> None:
    """How an object is looked for does not depend on the seed: another one would end the same way."""

    async def nothing(request: web.Request) -> web.Response:
        return web.Response(body=b"", headers={"X-Hopeless": "1", "X-Rejected": "no object in the image"})

    with pytest.raises(GenerationFailed, match="no object in the image"):
        await ask_service(nothing, ImageTask(id="1", prompt="aGk="))


async def test_a_picture_of_which_one_seed_makes_nothing_is_tried_again() -> None:
    async def too_many(request: web.Request) -> web.Response:
        return web.Response(body=b"", headers={"X-Num-Gaussians": "0", "X-Rejected": "structure: too many voxels"})

    generated = await ask_service(too_many, ImageTask(id="1", prompt="aGk="))
    assert (generated.ply, generated.rejected) == (b"", "structure: too many voxels")


async def test_base64_in_lines_is_a_picture() -> None:
    async def handler(request: web.Request) -> web.Response:
        upload = (await request.post())["prompt_image_file"]
        assert isinstance(upload, web.FileField)
        assert upload.file.read() == b"hi there"
        return web.Response(body=PLY)

    assert (await ask_service(handler, ImageTask(id="1", prompt="aGkg\r\ndGhlcmU=\n"))).ply == PLY


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("says", "seconds"), [("7", 7), ("86400", 60), ("Wed, 21 Oct 2026 07:28:00 GMT", 5)])
async def test_a_busy_service_says_for_how_long(status: int, says: str, seconds: float) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Retry-After": says})

    with pytest.raises(EndpointUnavailable) as busy:
        await ask_service(handler, TextTask(id="1", prompt="p"))
    assert busy.value.seconds == seconds


async def test_a_service_that_is_gone() -> None:
    async with GenerationService("http://127.0.0.1:9") as service:
        with pytest.raises(EndpointUnavailable):
            await service.generate(TextTask(id="1", prompt="p"), 1)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (GenerationFailed, 400),
        (GenerationFailed, 413),
        (GenerationFailed, 422),
        (AttemptFailed, 500),
        (AttemptFailed, 504),
        (AttemptFailed, 408),
        (EndpointUnavailable, 401),  # of a proxy or a gateway: the task can go elsewhere
        (EndpointUnavailable, 404),
    ],
)
async def test_other_answers_end_the_task_or_the_attempt(failure: type[Exception], status: int) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, text="\x1b[31mbad\nline")

    with pytest.raises(failure, match=rf"{status}: '\\x1b\[31mbad\\nline'"):
        await ask_service(handler, TextTask(id="1", prompt="p"))


@pytest.mark.parametrize(
    "task",
    [
        TextTask(id="1", prompt=""),
        TextTask(id="1", prompt="x" * 1025),
        TextTask(id="1", prompt="a\x1b[2Jb"),
        TextTask(id="1", prompt=" \n\t"),
        TextTask(id="1", prompt="\x9b"),
        ImageTask(id="1", prompt="no base64!"),
    ],
)
async def test_prompts_that_are_not_fit_never_reach_the_service(task: Task) -> None:
    async with GenerationService("http://127.0.0.1:9") as service:
        with pytest.raises(GenerationFailed):
            await service.generate(task, 1)


async def test_a_password_in_an_address_is_used_and_never_shown() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        return web.json_response({"status": "ready"})

    runner, url = await serve(handler)
    async with GenerationService(url.replace("://", "://miner:secret@")) as service:
        assert await service.health() == "ready"
        assert service.endpoint == url
    await runner.cleanup()
    assert seen == [aiohttp.encode_basic_auth("miner", "secret")]


async def test_health_opens_and_closes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "HEALTH_INTERVAL_S", 0.01)
    status = "loading"
    asked = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"status": status})

    runner, url = await serve(handler)
    async with GenerationService(url) as service, asyncio.timeout(5):
        pool = GeneratorPool([service])
        watching = asyncio.create_task(pool.watch())
        await until(lambda: asked >= 3)
        assert not pool.ready.is_set()
        status = "ready"
        await pool.ready.wait()
        await runner.cleanup()
        await until(lambda: not pool.ready.is_set())
        watching.cancel()
