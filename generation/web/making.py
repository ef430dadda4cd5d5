"""Routes that make a splat: /generate/ and /generate_video/."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from generation.engine.engine import DeadlineExceeded, Engine, Unavailable
from generation.fleet.candidates import Candidates
from generation.fleet.fleet import Fleet
from generation.schema.results import Asset
from generation.web import intake, openapi
from generation.web.answers import report_headers
from generation.web.errors import ApiError
from generation.web.events import Events, Following
from generation.web.film import film
from generation.web.metrics import Metrics
from generation.web.time_left import kind_of
from generation.web.waiting import while_connected


def router(
    engine: Engine | Fleet,
    candidates: Candidates,
    events: Events,
    metrics: Metrics,
    threshold: float,
    device: Callable[[], str],
) -> APIRouter:
    """``threshold``: lowest score worth submitting, 0..1. ``device``: the engine's, once it is known."""
    routes = APIRouter()

    @routes.post("/generate", include_in_schema=False)
    @routes.post(
        "/generate/",
        response_class=Response,
        openapi_extra=openapi.FORM,
        responses=openapi.results("application/octet-stream", "A 3DGS PLY"),
    )
    async def generate(request: Request) -> Response:
        """Make a splat from a text or an image. An empty body means that it failed the self-check: see X-Rejected."""
        with followed(request) as following:
            asset, headers = await make(request, following)
        return Response(asset.ply, media_type="application/octet-stream", headers=headers)

    @routes.post("/generate_video", include_in_schema=False)
    @routes.post(
        "/generate_video/",
        response_class=Response,
        openapi_extra=openapi.FORM,
        responses=openapi.results("video/mp4", "A turntable"),
    )
    async def generate_video(request: Request) -> Response:
        """Make a splat as /generate/ does, and return a video of it turning once."""
        with followed(request) as following:
            asset, headers = await make(request, following)
            if not asset.ply:
                return Response(b"", media_type="video/mp4", headers=headers)
            following.progress("video", 0.0)
            video = await while_connected(request, film(engine, asset.ply, device(), following.background))
            return Response(video, media_type="video/mp4", headers=headers)

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

    async def make(request: Request, following: Following) -> tuple[Asset, dict[str, str]]:
        started = time.monotonic()
        engine.check_admission(following.background)
        asked = await intake.read_form(request, threshold, following.background)
        following.queued(kind_of(request.url.path.strip("/"), asked))
        asset = await while_connected(request, candidates.generate(asked, following.progress))
        following.report = asset.report
        metrics.record(asset.report, time.monotonic() - started)
        return asset, {"X-Request-Id": following.request_id, **report_headers(asset.report)}

    return routes


def _verdict(error: BaseException, stage: str) -> tuple[str, str]:
    """Outcome and reason for listeners of a request without a result. Never quotes its prompt."""
    if isinstance(error, ClientDisconnect):
        return "cancelled", "the client hung up"
    if isinstance(error, ApiError | Unavailable):
        return "refused" if stage in ("receiving", "queued") else "failed", str(error)
    return "failed", str(error) if isinstance(error, DeadlineExceeded) else f"stage {stage} failed"
