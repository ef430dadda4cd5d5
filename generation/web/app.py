"""Routes and wire types of the generation service. No model code."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Path, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from common.log_lines import escape
from common.version import VERSION
from generation.engine.engine import DeadlineExceeded, Engine, StageFailed, Unavailable
from generation.fleet.candidates import Candidates
from generation.fleet.fleet import Fleet
from generation.schema.score import formula, shares
from generation.settings import Settings
from generation.web import docs_page, intake, openapi
from generation.web.errors import ApiError
from generation.web.events import Events, EventStream, Following
from generation.web.hosts import SameSite
from generation.web.intake import BodyLimit
from generation.web.metrics import Metrics
from generation.web.pictures import decode
from generation.web.studio import routes as studio
from generation.web.studio.gallery import Gallery
from generation.web.studio.makers import Makers

MAX_REASON_CHARACTERS = 500
ENGINE_STOP_S = 5.0

T = TypeVar("T")


def create_app(engine: Engine | Fleet, settings: Settings) -> FastAPI:
    """The FastAPI app around an engine, which the app starts and stops."""
    started = time.monotonic()
    events = Events()
    metrics = Metrics(engine)
    candidates = Candidates(engine)

    def resolved() -> Settings:
        """What the engines run with, which a cluster's service does not know before it has one."""
        return (engine.resolved if isinstance(engine, Fleet) else None) or settings

    def device() -> str:
        return resolved().device

    makers = Makers(engine, candidates, Gallery(settings.gallery), events, device, metrics.record)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await makers.stop()
        await asyncio.to_thread(engine.stop, ENGINE_STOP_S)

    app = FastAPI(
        title="Competitive miner: generation",
        description=openapi.ABOUT,
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    limits = {path: intake.MAX_JSON_BYTES for path in ("/validate_txt_to_3d_ply", "/validate_img_to_3d_ply")}
    app.add_middleware(BodyLimit, limits=limits, default=intake.MAX_FORM_BYTES)
    app.add_middleware(SameSite, allowed=settings.allowed_hosts)  # the outermost
    _add_error_handlers(app)
    app.state.events = events  # closed before the server waits for open responses
    # Splats are decoded before admission, so their number is bounded. Background requests wait for others.
    scoring = {background: asyncio.Semaphore(2) for background in (False, True)}

    @app.post("/generate", include_in_schema=False)
    @app.post(
        "/generate/",
        response_class=Response,
        openapi_extra=openapi.FORM,
        responses=openapi.results("application/octet-stream", "A 3DGS PLY"),
    )
    async def generate(request: Request) -> Response:
        """Make a splat from a text or an image. An empty body means that it failed the self-check: see X-Rejected."""
        with followed(request) as following:
            asset, headers = await _generate(request, following)
        return Response(asset.ply, media_type="application/octet-stream", headers=headers)

    @app.post("/generate_video", include_in_schema=False)
    @app.post(
        "/generate_video/",
        response_class=Response,
        openapi_extra=openapi.FORM,
        responses=openapi.results("video/mp4", "A turntable"),
    )
    async def generate_video(request: Request) -> Response:
        """Make a splat as /generate/ does, and return a video of it turning once."""
        with followed(request) as following:
            asset, headers = await _generate(request, following)
            if not asset.ply:
                return Response(b"", media_type="video/mp4", headers=headers)
            following.progress("video", 0.0)
            film = partial(_film, data=asset.ply, device=device())
            frames = await _while_connected(request, engine.call(film, following.background))
            return Response(await asyncio.to_thread(_encode, frames), media_type="video/mp4", headers=headers)

    @contextmanager
    def followed(request: Request) -> Iterator[Following]:
        """Tell listeners how the request ends."""
        request_id = intake.check_request_id(request.headers.get("X-Request-Id"))
        request.state.request_id = request_id
        background = intake.check_priority(request.headers.get("X-Priority"))
        with events.request(request_id, background) as following:
            try:
                yield following
            except BaseException as error:
                following.end(*_verdict(error, following.stage))
                raise
            report = following.report
            following.end("delivered" if report.rejected is None else "rejected", report.rejected, report.score)

    async def _generate(request: Request, following: Following) -> tuple[Any, dict[str, str]]:
        started = time.monotonic()
        engine.check_admission(following.background)
        asked = await intake.read_form(request, settings.validation_threshold, following.background)
        kind = "text" if asked.image is None else "image"
        several = "" if asked.candidates == 1 else ", best of several"
        following.queued(f"{request.url.path.strip('/')} {kind}{several}")
        asset = await _while_connected(request, candidates.generate(asked, following.progress))
        following.report = asset.report
        metrics.record(asset.report, time.monotonic() - started)
        return asset, {"X-Request-Id": following.request_id, **report_headers(asset.report)}

    @app.post("/validate_txt_to_3d_ply/", openapi_extra=openapi.score("prompt"), responses=openapi.SCORES)
    async def validate_text(request: Request) -> dict[str, Any]:
        """Score a splat against a text prompt, as the validators' scoring service does."""
        background = intake.check_priority(request.headers.get("X-Priority"))
        body = await intake.read_score_request(request)
        async with scoring[background]:
            return await _score(request, body, intake.check_prompt(body.prompt or ""), background)

    @app.post("/validate_img_to_3d_ply/", openapi_extra=openapi.score("prompt_image"), responses=openapi.SCORES)
    async def validate_image(request: Request) -> dict[str, Any]:
        """Score a splat against an image prompt, as the validators' scoring service does."""
        background = intake.check_priority(request.headers.get("X-Priority"))
        body = await intake.read_score_request(request)
        async with scoring[background]:
            data = intake.decode_base64(body.prompt_image or "", "prompt_image")
            picture = await decode(data, "prompt_image")
            return await _score(request, body, picture.target, background)

    async def _score(request: Request, body: intake.ScoreRequest, prompt: Any, background: bool) -> dict[str, Any]:
        data = await asyncio.to_thread(intake.decode_base64, body.data, "data")
        previews = (body.generate_single_preview, body.generate_grid_preview, body.preview_score_threshold)
        score = partial(_validate, data=data, compression=body.compression, prompt=prompt, previews=previews)
        try:
            scores = await _while_connected(request, engine.call(score, background))
        except ValueError as error:
            raise ApiError(422, "data", str(error)) from error
        encoded = {
            name: None if (png := getattr(scores, name)) is None else base64.b64encode(png).decode()
            for name in ("preview", "grid_preview")
        }
        return {**_jsonable(asdict(scores)), **encoded}

    async def film_kept(data: bytes) -> bytes:
        frames = await engine.call(partial(_film, data=data, device=device()), False)
        return await asyncio.to_thread(_encode, frames)

    app.include_router(studio.router(makers, settings.validation_threshold, film_kept, settings.miner_url))

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("studio/")

    @app.get("/health", responses=openapi.COMMON)
    async def health() -> dict[str, Any]:
        """State of the service and its engines, and totals since the start."""
        return {
            "status": engine.status,
            "reason": engine.reason,
            "profile": settings.profile,
            "profile_reason": settings.profile_reason,
            "device": device(),
            "memory_class": settings.memory_class,
            "memory_reason": settings.memory_reason,
            "generators": {
                "text": {"name": settings.options.generator, "config": settings.config.name},
                "image": {"name": settings.image_options.generator, "config": settings.image_config.name},
            },
            "models": engine.models,
            "score": {
                "formula": formula(resolved().models.score_parts),
                "shares": shares(resolved().models.score_parts),
                "missing": resolved().missing,
            },
            "queue_depth": engine.queue_depth,
            "max_queue": settings.max_queue,
            "active": engine.active,
            "engines": engine.health(),
            "totals": engine.totals,
            "uptime_seconds": round(time.monotonic() - started, 1),
            "version": VERSION,
        }

    @app.get("/events/{request_id}", response_class=Response, responses=openapi.EVENTS)
    async def follow(request_id: Annotated[str, Path(json_schema_extra=openapi.REQUEST_ID)]) -> Response:
        """Progress of the request with this X-Request-Id, from up to 30 s before it is sent until its end."""
        return EventStream(events, intake.check_request_id(request_id))

    @app.get("/events", response_class=Response, responses=openapi.EVENTS)
    async def follow_all() -> Response:
        """Progress of all requests."""
        return EventStream(events, None)

    @app.get("/metrics", response_class=Response, responses=openapi.METRICS)
    async def get_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page.render(app.openapi()), headers=docs_page.HEADERS)

    @app.get("/version/", responses=openapi.COMMON)
    async def get_version() -> str:
        """The version of this software."""
        return VERSION

    return app


# These functions run beside the pipeline, perhaps in another process. They and their arguments must be picklable.


def _film(pipeline: Any, data: bytes, device: str) -> Any:
    from generation.splats import ply
    from generation.web import turntable

    return turntable.render(ply.read(data).to(device))


def _encode(frames: Any) -> bytes:
    from generation.web import turntable  # brings torch, which takes seconds to import

    return turntable.encode(frames)


def _validate(
    pipeline: Any, data: bytes, compression: int, prompt: Any, previews: tuple[bool, bool, float] = (False, False, 0.6)
) -> Any:
    from common.spz import unzstd
    from generation.splats import ply, spz

    if compression == 2:
        data = ply.write(spz.decode(data))
    elif compression == 1:
        data = unzstd(data, intake.MAX_DATA_CHARACTERS * 4)
    return pipeline.validate(data, prompt, *previews)


def report_headers(report: Any) -> dict[str, str]:
    """A ``generation.schema.results.Report`` as HTTP headers: ASCII, one line each, whatever the report says."""
    headers = {
        "X-Seed": str(report.seed),
        "X-Num-Gaussians": str(report.num_gaussians),
        "X-Seconds": json.dumps({stage: round(seconds, 3) for stage, seconds in report.seconds.items()}),
    }
    if report.text_cut:
        headers["X-Text-Cut"] = json.dumps(report.text_cut)
    if report.score is not None:
        headers["X-Score"] = f"{report.score:.4f}"
        parts = {part: None if value is None else round(value, 4) for part, value in report.parts.items()}
        headers["X-Score-Parts"] = json.dumps(_jsonable(parts))
    if report.candidates:
        headers["X-Scores"] = json.dumps([[seed, _rounded(score)] for seed, score in report.candidates])
    if report.hopeless:
        headers["X-Hopeless"] = "1"
    if report.rejected is not None:
        reason = escape(report.rejected)[:MAX_REASON_CHARACTERS]
        headers["X-Rejected"] = reason.encode("ascii", "backslashreplace").decode("ascii")
    return headers


def _rounded(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else round(score, 4)


def _jsonable(value: Any) -> Any:
    """JSON has no infinities, which a broken splat can measure: null instead."""
    if isinstance(value, dict):
        return {key: _jsonable(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _verdict(error: BaseException, stage: str) -> tuple[str, str]:
    """Outcome and reason for listeners of a request without a result. Never quotes its prompt."""
    if isinstance(error, ClientDisconnect):
        return "cancelled", "the client hung up"
    if isinstance(error, ApiError | Unavailable):
        return "refused" if stage in ("receiving", "queued") else "failed", str(error)
    return "failed", str(error) if isinstance(error, DeadlineExceeded) else f"stage {stage} failed"


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``. When the client disconnects, cancels it and raises ClientDisconnect.

    Raises Unavailable when the server ends with the request unfinished. To be called once the request's body is read:
    after that, the only message left is the disconnect.
    """

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    except asyncio.CancelledError:  # the server's patience with requests in flight is over
        raise Unavailable("the service is shutting down", None) from None
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


def _add_error_handlers(app: FastAPI) -> None:
    def answer(
        request: Request, status: int, message: str, field: str | None = None, limit: Any = None, **headers: str
    ) -> JSONResponse:
        if (request_id := getattr(request.state, "request_id", None)) is not None:
            headers["X-Request-Id"] = request_id
        return JSONResponse({"error": {"field": field, "message": message, "limit": limit}}, status, headers)

    def retry(seconds: int | None) -> dict[str, str]:
        return {} if seconds is None else {"Retry-After": str(seconds)}

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return answer(request, error.status, error.message, error.field, error.limit, **retry(error.retry_after))

    @app.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        return answer(request, 503, str(error), **retry(error.retry_after))

    @app.exception_handler(DeadlineExceeded)
    async def late(request: Request, error: DeadlineExceeded) -> Response:
        return answer(request, 504, str(error))

    @app.exception_handler(StageFailed)
    async def failed(request: Request, error: StageFailed) -> Response:
        return answer(request, 500, f"generation failed: {error}")

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), **dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return answer(request, 500, "internal error")
