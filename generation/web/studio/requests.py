"""Requests started in Studio. They continue when the page is closed."""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from PIL import Image

from common.log_lines import escape
from generation.engine.engine import Engine
from generation.fleet.candidates import Candidates
from generation.fleet.fleet import Fleet
from generation.schema.results import Request
from generation.web.errors import ApiError
from generation.web.events import Events
from generation.web.studio.gallery import PICTURE, SPLAT, THUMBNAIL, Gallery, Result
from generation.web.time_left import kind_of

MOST_IN_PROGRESS = 16
PICTURE_SIDE = 256  # pixels, of a prompt picture as it is kept
THUMBNAIL_SIDE = 256  # pixels
MOST_REASON = 500  # characters

log = logging.getLogger("generation.web.studio")


@dataclass
class InProgress:
    """A request in progress."""

    id: str
    prompt: str | None
    seed: int
    task: asyncio.Task[None] | None = None
    preview: bytes = b""  # the latest preview, a WEBP


class StudioRequests:
    """Runs requests on the engine, and keeps their results in the gallery. For the asyncio thread."""

    def __init__(
        self,
        engine: Engine | Fleet,
        candidates: Candidates,
        gallery: Gallery,
        events: Events,
        device: Callable[[], str],
        record: Callable[[Any, float], None],
    ) -> None:
        self.gallery = gallery
        self._engine, self._candidates, self._events, self._device = engine, candidates, events, device
        self._record = record
        self._in_progress: dict[str, InProgress] = {}

    @property
    def in_progress(self) -> list[InProgress]:
        """The requests in progress, newest first."""
        return list(reversed(self._in_progress.values()))

    def check_room(self) -> None:
        """Raises ApiError when too many are in progress, and Unavailable as the engine's admission does."""
        if len(self._in_progress) >= MOST_IN_PROGRESS:
            raise ApiError(503, None, f"{MOST_IN_PROGRESS} requests of this page are in progress", MOST_IN_PROGRESS, 5)
        self._engine.check_admission()

    def start(self, asked: Request) -> str:
        """Start a request. Returns its id, for /events/{request_id}."""
        request_id = f"studio-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        current = InProgress(request_id, asked.prompt, asked.seed)
        work = self._make(current, replace(asked, watched=True))
        self._in_progress[request_id] = current
        current.task = asyncio.get_running_loop().create_task(work)
        current.task.add_done_callback(lambda _: self._in_progress.pop(request_id, None))
        return request_id

    def preview(self, request_id: str) -> bytes:
        """The latest preview of a request, a WEBP; b"" if there is none."""
        current = self._in_progress.get(request_id)
        return current.preview if current else b""

    def cancel(self, request_id: str) -> bool:
        """Cancel a request. Returns whether it was in progress."""
        current = self._in_progress.get(request_id)
        return current is not None and current.task is not None and current.task.cancel()

    async def stop(self) -> None:
        """Cancel all requests in progress."""
        tasks = [current.task for current in self._in_progress.values() if current.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self, current: InProgress, asked: Request) -> None:
        request_id = current.id
        began = time.monotonic()
        about: dict[str, Any] = {"id": request_id, "made_at": time.time(), "prompt": asked.prompt, "seed": asked.seed}
        files: dict[str, bytes] = {}
        with self._events.request(request_id) as following:

            def progress(stage: str, fraction: float, preview: bytes = b"") -> None:
                if preview:
                    current.preview = preview
                following.progress(stage, fraction)

            try:
                if asked.image is not None:
                    files[PICTURE] = await asyncio.to_thread(_small, asked.image)
                following.queued(kind_of("generate", asked))
                asset = await self._candidates.generate(asked, progress)
                self._record(asset.report, time.monotonic() - began)
                if asset.ply:
                    files[SPLAT] = asset.ply
                    with suppress(Exception):  # the page then shows the result without it
                        files[THUMBNAIL] = await self._engine.call(
                            partial(_thumbnail, data=asset.ply, device=self._device()), False
                        )
            except asyncio.CancelledError:
                following.end("cancelled", "cancelled on the page")
                raise
            except Exception as error:
                log.warning("Studio: a request failed in stage %s: %s", following.stage, type(error).__name__)
                reason = escape(f"stage {following.stage} failed: {error}")[:MOST_REASON]
                self._keep(Result(**about, outcome="failed", reason=reason), files)
                following.end("failed", reason)
                return
            report = asset.report
            result = Result(
                **about | {"made_at": time.time(), "seed": report.seed},
                outcome="delivered" if report.rejected is None else "rejected",
                reason=report.rejected,
                score=report.score,
                parts=report.parts,
                candidates=report.candidates,
                num_gaussians=report.num_gaussians,
                seconds=report.seconds,
            )
            self._keep(result, files)
            following.end(result.outcome, result.reason, result.score)

    def _keep(self, result: Result, files: dict[str, bytes]) -> None:
        try:
            self.gallery.add(result, files)
        except OSError as error:
            log.error("Studio: a result can not be kept: %s", error)


def _small(image: Image.Image) -> bytes:
    image = image.copy()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return _webp(image)


def _webp(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=85)
    return out.getvalue()


def _thumbnail(pipeline: Any, data: bytes, device: str) -> bytes:
    """A front view of the PLY ``data``, as a WEBP. Runs on the engine thread, perhaps in another process."""
    from generation.splats import ply
    from generation.web import turntable

    (frame,) = turntable.render(ply.read(data).to(device), THUMBNAIL_SIDE, 1)
    return _webp(Image.fromarray(frame))
