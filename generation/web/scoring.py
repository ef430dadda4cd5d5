"""Routes that score a splat, as the validators' scoring service does."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from generation.engine.engine import Engine
from generation.fleet.fleet import Fleet
from generation.web import intake, openapi
from generation.web.answers import jsonable
from generation.web.errors import ApiError
from generation.web.pictures import decode
from generation.web.waiting import while_connected

#: path -> most bytes of a body
BODY_LIMITS = {path: intake.MAX_JSON_BYTES for path in ("/validate_txt_to_3d_ply", "/validate_img_to_3d_ply")}


def router(engine: Engine | Fleet) -> APIRouter:
    """The routes /validate_txt_to_3d_ply/ and /validate_img_to_3d_ply/."""
    routes = APIRouter()
    # Splats are decoded before admission, so their number is bounded. Background requests wait for others.
    decoding = {background: asyncio.Semaphore(2) for background in (False, True)}

    @routes.post("/validate_txt_to_3d_ply/", openapi_extra=openapi.score("prompt"), responses=openapi.SCORES)
    async def validate_text(request: Request) -> dict[str, Any]:
        """Score a splat against a text prompt, as the validators' scoring service does."""
        background = intake.check_priority(request.headers.get("X-Priority"))
        body = await intake.read_score_request(request)
        async with decoding[background]:
            return await score(request, body, intake.check_prompt(body.prompt or ""), background)

    @routes.post("/validate_img_to_3d_ply/", openapi_extra=openapi.score("prompt_image"), responses=openapi.SCORES)
    async def validate_image(request: Request) -> dict[str, Any]:
        """Score a splat against an image prompt, as the validators' scoring service does."""
        background = intake.check_priority(request.headers.get("X-Priority"))
        body = await intake.read_score_request(request)
        async with decoding[background]:
            data = intake.decode_base64(body.prompt_image or "", "prompt_image")
            picture = await decode(data, "prompt_image")
            return await score(request, body, picture.target, background)

    async def score(request: Request, body: intake.ScoreRequest, prompt: Any, background: bool) -> dict[str, Any]:
        data = await asyncio.to_thread(intake.decode_base64, body.data, "data")
        previews = (body.generate_single_preview, body.generate_grid_preview, body.preview_score_threshold)
        scoring = partial(validate, data=data, compression=body.compression, prompt=prompt, previews=previews)
        try:
            scores = await while_connected(request, engine.call(scoring, background))
        except ValueError as error:
            raise ApiError(422, "data", str(error)) from error
        encoded = {
            name: None if (png := getattr(scores, name)) is None else base64.b64encode(png).decode()
            for name in ("preview", "grid_preview")
        }
        return {**jsonable(asdict(scores)), **encoded}

    return routes


def validate(
    pipeline: Any, data: bytes, compression: int, prompt: Any, previews: tuple[bool, bool, float] = (False, False, 0.6)
) -> Any:
    """The splat's ``Scores``. Runs beside the pipeline, perhaps in another process: its arguments must be picklable.

    Raises ValueError when the data is no splat.
    """
    from common.spz import unzstd
    from generation.splats import ply, spz

    if compression == 2:
        data = ply.write(spz.decode(data))
    elif compression == 1:
        data = unzstd(data, intake.MAX_DATA_CHARACTERS * 4)
    return pipeline.validate(data, prompt, *previews)
