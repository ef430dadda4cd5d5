"""Requests that the page has started. They run on when the page is closed."""

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

from generation.engine.engine import Engine
from generation.fleet.candidates import Candidates
from generation.fleet.fleet import Fleet
from generation.schema.results import Asset, Request
from generation.web.events import Events
from generation.web.intake import ApiError
from generation.web.studio.gallery import PICTURE, SPLAT, THUMBNAIL, Gallery, Result

MOST_IN_PROGRESS = 16
PICTURE_SIDE = 256  # pixels, of a prompt picture as it is kept
THUMBNAIL_SIDE = 256  # pixels

log = logging.getLogger("generation.web.studio")


@dataclass(frozen=True)
class Making:
    """A request in progress."""

    id: str
    prompt: str | None
    seed: int
    began_at: float  # unix seconds
    task: asyncio.Task[None]


class Makers:
    """Runs requests on the engine, and keeps what becomes of them in the gallery. For the asyncio thread."""

    def __init__(
        self,
        engine: Engine | Fleet,
        candidates: Candidates,
        gallery: Gallery,
        events: Events,
        device: str,
        threshold: float,
        record: Callable[[Any, float], None],
    ) -> None:
        self.gallery = gallery
        self._engine, self._candidates, self._events, self._device = engine, candidates, events, device
        self._threshold, self._record = threshold, record
        self._in_progress: dict[str, Making] = {}

    @property
    def in_progress(self) -> list[Making]:
        """The newest first."""
        return list(reversed(self._in_progress.values()))

    def check_room(self) -> None:
        """Raises ApiError when too many are in progress, and what the engine's admission raises."""
        if len(self._in_progress) >= MOST_IN_PROGRESS:
            raise ApiError(503, None, f"{MOST_IN_PROGRESS} requests of this page are in progress", MOST_IN_PROGRESS, 5)
        self._engine.check_admission()

    def start(self, asked: Request) -> str:
        """Begin to make it; its id, by which its events are told."""
        request_id = f"studio-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        # All that was generated is shown, also what is not worth submitting: that is decided below.
        work = self._make(request_id, replace(asked, threshold=0.0))
        task = asyncio.get_running_loop().create_task(work)
        self._in_progress[request_id] = Making(request_id, asked.prompt, asked.seed, time.time(), task)
        task.add_done_callback(lambda _: self._in_progress.pop(request_id, None))
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Whether it was in progress."""
        making = self._in_progress.get(request_id)
        return making is not None and making.task.cancel()

    async def stop(self) -> None:
        """Give up all that is in progress."""
        tasks = [making.task for making in self._in_progress.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self, request_id: str, asked: Request) -> None:
        began = time.monotonic()
        kind = "text" if asked.image is None else "image"
        about: dict[str, Any] = {"id": request_id, "made_at": time.time(), "prompt": asked.prompt, "seed": asked.seed}
        files = {} if asked.image is None else {PICTURE: await asyncio.to_thread(_small, asked.image)}
        with self._events.request(request_id) as following:
            following.queued(f"generate {kind}")
            try:
                asset = await self._candidates.generate(asked, following.progress)
            except asyncio.CancelledError:
                following.end("cancelled", "cancelled on the page")
                raise
            except Exception as error:
                log.warning("Studio: a request failed in stage %s: %s", following.stage, type(error).__name__)
                reason = f"stage {following.stage} failed: {error}"
                self._keep(Result(**about, outcome="failed", reason=reason[:500]), files)
                following.end("failed", reason[:500])
                return
            self._judge(asset)
            self._record(asset.report, time.monotonic() - began)
            if asset.ply:
                files[SPLAT] = asset.ply
                with suppress(Exception):  # the page shows it without
                    files[THUMBNAIL] = await self._engine.call(
                        partial(_thumbnail, data=asset.ply, device=self._device), False
                    )
            report = asset.report
            result = Result(
                **about | {"made_at": time.time()},
                outcome="delivered" if report.rejected is None else "rejected",
                reason=report.rejected,
                score=report.score,
                parts=report.parts,
                num_gaussians=report.num_gaussians,
                seconds=report.seconds,
            )
            self._keep(result, files)
            following.end(result.outcome, result.reason, result.score)

    def _judge(self, asset: Asset) -> None:
        report = asset.report
        if report.rejected is None and report.score is not None and report.score < self._threshold:
            report.rejected = f"score {report.score:.2f} is under the threshold {self._threshold:.2f}"

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
    """A front view, as a WEBP. Runs beside the pipeline, perhaps in another process."""
    from generation.splats import ply
    from generation.web import turntable

    (frame,) = turntable.render(ply.read(data).to(device), THUMBNAIL_SIDE, 1)
    return _webp(Image.fromarray(frame))
