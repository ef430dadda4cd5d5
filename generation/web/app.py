"""The generation service as a FastAPI app: an engine, and all routes around it. No model code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

from common.version import VERSION
from generation.engine.engine import Engine
from generation.fleet.candidates import Candidates
from generation.fleet.fleet import Fleet
from generation.settings import Settings
from generation.web import docs_page, intake, making, openapi, scoring, status
from generation.web.errors import add_error_handlers
from generation.web.events import Events
from generation.web.film import film
from generation.web.hosts import SameSite
from generation.web.intake import BodyLimit
from generation.web.metrics import Metrics
from generation.web.studio import routes as studio
from generation.web.studio.gallery import Gallery
from generation.web.studio.requests import StudioRequests

ENGINE_STOP_S = 5.0


def create_app(engine: Engine | Fleet, settings: Settings) -> FastAPI:
    """The FastAPI app around an engine, which the app starts and stops."""
    events = Events()
    metrics = Metrics(engine)
    candidates = Candidates(engine)

    def resolved() -> Settings:
        """What the engines run with, which a cluster's service does not know before it has one."""
        return (engine.resolved if isinstance(engine, Fleet) else None) or settings

    def device() -> str:
        return resolved().device

    async def film_kept(ply_data: bytes) -> bytes:
        return await film(engine, ply_data, device())

    studio_requests = StudioRequests(engine, candidates, Gallery(settings.gallery), events, device, metrics.record)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await studio_requests.stop()
        await asyncio.to_thread(engine.stop, ENGINE_STOP_S)

    app = FastAPI(
        title="Competitive miner: generation",
        description=openapi.ABOUT,
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, limits=scoring.BODY_LIMITS, default=intake.MAX_FORM_BYTES)
    app.add_middleware(SameSite, allowed=settings.allowed_hosts)  # the outermost
    add_error_handlers(app)
    app.state.events = events  # closed before the server waits for open responses
    threshold = settings.validation_threshold
    app.include_router(making.router(engine, candidates, events, metrics, threshold, device))
    app.include_router(scoring.router(engine))
    app.include_router(studio.router(studio_requests, threshold, film_kept, settings.miner_url))
    app.include_router(status.router(engine, events, metrics, settings, resolved))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page.render(app.openapi()), headers=docs_page.HEADERS)

    return app
