"""Routes that tell of the service: its health, the progress of requests, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi.responses import RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from common.version import VERSION
from generation.engine.engine import Engine
from generation.fleet.fleet import Fleet
from generation.schema.score import formula, shares
from generation.settings import Settings
from generation.web import intake, openapi
from generation.web.events import Events, EventStream
from generation.web.metrics import Metrics


def router(
    engine: Engine | Fleet, events: Events, metrics: Metrics, settings: Settings, resolved: Callable[[], Settings]
) -> APIRouter:
    """``settings`` are the service's own, ``resolved`` gives those that the engines run with."""
    routes = APIRouter()
    started = time.monotonic()

    @routes.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("studio/")

    @routes.get("/health", responses=openapi.COMMON)
    async def health() -> dict[str, Any]:
        """State of the service and its engines, and totals since the start."""
        return {
            "status": engine.status,
            "reason": engine.reason,
            "profile": settings.profile,
            "profile_reason": settings.profile_reason,
            "device": resolved().device,
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

    @routes.get("/events/{request_id}", response_class=Response, responses=openapi.EVENTS)
    async def follow(request_id: Annotated[str, Path(json_schema_extra=openapi.REQUEST_ID)]) -> Response:
        """Progress of the request with this X-Request-Id, from up to 30 s before it is sent until its end."""
        return EventStream(events, intake.check_request_id(request_id))

    @routes.get("/events", response_class=Response, responses=openapi.EVENTS)
    async def follow_all() -> Response:
        """Progress of all requests."""
        return EventStream(events, None)

    @routes.get("/metrics", response_class=Response, responses=openapi.METRICS)
    async def get_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/version/", responses=openapi.COMMON)
    async def get_version() -> str:
        """The version of this software."""
        return VERSION

    return routes
