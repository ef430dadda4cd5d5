"""Studio's routes: the page and its data. The page's content security policy allows no other origin."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from generation.web import intake
from generation.web.errors import ApiError
from generation.web.studio import miner
from generation.web.studio.gallery import FILM, PICTURE, SPLAT, THUMBNAIL, as_json
from generation.web.studio.requests import StudioRequests

STATIC = Path(__file__).resolve().parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "media-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
KEPT = {
    "splat.ply": (SPLAT, "application/octet-stream"),
    "thumbnail.webp": (THUMBNAIL, "image/webp"),
    "picture.webp": (PICTURE, "image/webp"),
}
#: Makes the turntable (mp4) of a PLY.
Film = Callable[[bytes], Awaitable[bytes]]


def router(studio: StudioRequests, threshold: float, film: Film, miner_url: str) -> APIRouter:
    """The routes under /studio."""
    routes = APIRouter(prefix="/studio", include_in_schema=False)
    pages = {path.name: path for path in STATIC.iterdir() if path.suffix in TYPES}
    filming, compressing = asyncio.Lock(), asyncio.Lock()  # each takes 200 MB and more

    def page(name: str) -> Response:
        if (path := pages.get(name)) is None:
            raise ApiError(404, "path", "no such file")
        return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)

    @routes.get("")
    async def without_slash() -> Response:
        return RedirectResponse("studio/")

    @routes.get("/")
    async def index() -> Response:
        return page("index.html")

    @routes.get("/static/{name}")
    async def static(name: str) -> Response:
        return page(name)

    @routes.get("/requests")
    async def requests() -> dict[str, Any]:
        """Requests in progress, and results in the gallery."""
        return {
            "in_progress": [{"id": each.id, "prompt": each.prompt, "seed": each.seed} for each in studio.in_progress],
            "results": [as_json(each) for each in studio.gallery.results()],
        }

    @routes.post("/requests", status_code=202)
    async def make(request: Request) -> dict[str, Any]:
        """Start a request, with a form as for /generate/. It continues when the page is closed."""
        studio.check_room()
        asked = await intake.read_form(request, threshold, False)
        studio.check_room()
        return {"id": studio.start(asked), "seed": asked.seed}

    @routes.get("/miner")
    async def mining() -> dict[str, Any]:
        try:
            return await asyncio.to_thread(miner.activity, miner_url)
        except miner.NoMiner as error:
            raise ApiError(503, "miner", str(error), None, 2) from error

    @routes.delete("/requests/{request_id}", status_code=204)
    async def give_up(request_id: str) -> None:
        """Cancel a request, or remove its result from the gallery."""
        if not studio.cancel(request_id) and not studio.gallery.remove(request_id):
            raise ApiError(404, "request_id", "no such request")

    @routes.get("/requests/{request_id}/splat.spz")
    async def spz(request_id: str) -> Response:
        """The result as `.spz`, as validators get it."""
        from common.spz import compress

        async with compressing:
            data = await asyncio.to_thread(kept(request_id, SPLAT).read_bytes)
            content = await asyncio.to_thread(compress, data)
        return Response(content, media_type="application/octet-stream")

    @routes.get("/requests/{request_id}/turntable.mp4")
    async def turntable(request_id: str) -> Response:
        """The result's turntable, made at the first call and kept."""
        async with filming:
            if studio.gallery.path(request_id, FILM) is None:
                data = await asyncio.to_thread(kept(request_id, SPLAT).read_bytes)
                content = await film(data)
                try:
                    studio.gallery.add_film(request_id, content)
                except (OSError, KeyError):  # it is returned all the same
                    return Response(content, media_type="video/mp4")
        return FileResponse(kept(request_id, FILM), media_type="video/mp4")

    @routes.get("/requests/{request_id}/preview.webp")
    async def preview(request_id: str) -> Response:
        """The latest preview of a request in progress; no content while, or once, there is none."""
        if not (content := studio.preview(request_id)):
            return Response(status_code=204)  # browsers log a 404 as an error of the page
        return Response(content, media_type="image/webp", headers={"Cache-Control": "no-store"})

    @routes.get("/requests/{request_id}/{name}")
    async def file(request_id: str, name: str) -> Response:
        if name not in KEPT:
            raise ApiError(404, "path", "no such file")
        stored, media_type = KEPT[name]
        headers = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
        return FileResponse(kept(request_id, stored), media_type=media_type, headers=headers)

    def kept(request_id: str, name: str) -> Path:
        if (path := studio.gallery.path(request_id, name)) is None:
            raise ApiError(404, "request_id", "nothing of this request is kept under this name")
        return path

    return routes
