"""What may come in over HTTP: every limit on a request's body, and the checks before anything else sees it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import secrets
import threading
import unicodedata
from email.message import Message as HeaderMessage
from typing import Annotated, Any

from fastapi import Request
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from generation.logging_setup import escape

MAX_PROMPT_CHARACTERS = 1024
MAX_SEED = 2**32 - 1
MAX_REQUEST_ID_CHARACTERS = 64
PRIORITIES = ("interactive", "background")
MAX_IMAGE_BYTES = 10 * 1024 * 1024
MAX_IMAGE_SIDE = 4096  # pixels
IMAGE_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
MAX_DATA_CHARACTERS = 64 * 1024 * 1024  # a splat in base64
MAX_TEXT_BYTES = 32 * 1024  # of a form's text field as it is sent; the longest prompt takes 12 kB
MAX_FORM_BYTES = MAX_IMAGE_BYTES + 1024 * 1024
MAX_JSON_BYTES = MAX_DATA_CHARACTERS + MAX_IMAGE_BYTES * 4 // 3 + 1024 * 1024
MAX_READ_S = 60.0  # for a whole body
# Read past a limit so far before the answer: a client that still sends would see a reset connection instead of it.
DRAIN_BYTES = 256 * 1024 * 1024
FORM_FIELDS = ("prompt", "prompt_image_file", "seed")
# More than any stage looks at; an upload of 4096 x 4096 should not wait in the queue at full size.
KEPT_IMAGE_SIDE = 2048
_decoders = threading.Semaphore(2)  # an image at full size takes 64 MB


class ApiError(Exception):
    """Becomes the JSON answer ``{"error": {"field", "message", "limit"}}``."""

    def __init__(
        self, status: int, field: str | None, message: str, limit: Any = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.message, self.limit = status, field, message, limit
        self.retry_after = retry_after


class BodyLimit:
    """ASGI middleware: a body beyond its path's limit is read no further and answered with 413."""

    def __init__(self, app: ASGIApp, limits: dict[str, int], default: int) -> None:
        self.app, self.limits, self.default = app, limits, default

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limits.get(scope["path"].rstrip("/"), self.default)
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                while message.get("more_body") and size < limit + DRAIN_BYTES:
                    message = await receive()
                    size += len(message.get("body", b""))
                raise ApiError(413, "body", f"the request's body is over {limit} bytes", limit)
            return message

        await self.app(scope, bounded, send)


async def read_form(request: Request) -> tuple[str | None, Image.Image | None, int | None]:
    """The checked fields of a generation request: (prompt, image, seed), exactly one of the first two.

    Raises ApiError naming the field and its limit.
    """
    _check_content_type(request, ("multipart/form-data", "application/x-www-form-urlencoded"))
    try:
        async with asyncio.timeout(MAX_READ_S):
            form = await request.form(max_files=len(FORM_FIELDS), max_fields=16, max_part_size=MAX_TEXT_BYTES)
    except TimeoutError:
        raise ApiError(408, "body", f"the request's body took longer than {MAX_READ_S:.0f} s", MAX_READ_S) from None
    except HTTPException as error:
        if "exceeded maximum size" not in error.detail:
            raise
        message = f"over {MAX_PROMPT_CHARACTERS} characters: a text field is over {MAX_TEXT_BYTES} bytes"
        raise ApiError(422, "prompt", message, MAX_PROMPT_CHARACTERS) from None
    try:
        return await _check_form(form)
    finally:
        await form.close()


async def _check_form(form: FormData) -> tuple[str | None, Image.Image | None, int | None]:
    for name in form:
        if name not in FORM_FIELDS:
            known = ", ".join(FORM_FIELDS)
            raise ApiError(422, escape(name[:64]), f"unknown field; known are {known}", list(FORM_FIELDS))
        if len(form.getlist(name)) > 1:
            raise ApiError(422, name, "given more than once", 1)
    seed = check_seed(_text(form, "seed"))
    upload = form.get("prompt_image_file")
    if isinstance(upload, UploadFile) and upload.filename:
        text = _text(form, "prompt")
        if text is not None and text.strip():
            raise ApiError(422, "prompt", "give either prompt or prompt_image_file, not both", 1)
        declared = (upload.content_type or "").partition(";")[0].strip().lower()
        if declared not in ("", "application/octet-stream", *IMAGE_FORMATS.values()):
            raise ApiError(415, "prompt_image_file", f"content type {escape(declared[:64])}", [*IMAGE_FORMATS.values()])
        data = await upload.read(MAX_IMAGE_BYTES + 1)
        return None, await asyncio.to_thread(decode_image, data, "prompt_image_file"), seed
    if isinstance(upload, str) and upload:
        raise ApiError(422, "prompt_image_file", "must be an uploaded file", list(IMAGE_FORMATS))
    text = _text(form, "prompt")
    if text is None:
        raise ApiError(422, "prompt", "missing: give prompt or prompt_image_file", 1)
    return check_prompt(text), None, seed


def _text(form: FormData, name: str) -> str | None:
    value = form.get(name)
    if isinstance(value, UploadFile):
        raise ApiError(422, name, "must be text, not a file")
    return value


def check_prompt(text: str) -> str:
    """The prompt without surrounding white space. Raises ApiError when it is empty, too long or has controls."""
    prompt = text.strip()
    if not prompt:
        raise ApiError(422, "prompt", "empty", "1..1024 characters")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ApiError(422, "prompt", f"{len(prompt)} characters", MAX_PROMPT_CHARACTERS)
    for character in prompt:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            raise ApiError(422, "prompt", f"control character U+{ord(character):04X}", "no control characters")
    return prompt


def check_seed(text: str | None) -> int | None:
    """None when not given. Raises ApiError when it is no whole number of 32 bits."""
    if text is None or not text.strip():
        return None
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()) or int(text) > MAX_SEED:
        raise ApiError(422, "seed", f"not a whole number in 0..{MAX_SEED}: {escape(text[:32])}", f"0..{MAX_SEED}")
    return int(text)


def check_request_id(text: str | None) -> str:
    """The id that a client gave its request, or a new one. Raises ApiError when it is long or has odd characters."""
    if text is None:
        return secrets.token_hex(8)
    if not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{MAX_REQUEST_ID_CHARACTERS}}}", text):
        limit = f"1..{MAX_REQUEST_ID_CHARACTERS} of A-Z a-z 0-9 . _ -"
        raise ApiError(422, "X-Request-Id", f"can not be an id: {escape(text[:32])}", limit)
    return text


def check_priority(text: str | None) -> bool:
    """Whether a request is in the background, by its X-Priority; None: it is not. Raises ApiError for other words."""
    if text not in (None, *PRIORITIES):
        raise ApiError(422, "X-Priority", f"unknown: {escape(text[:32])}", list(PRIORITIES))
    return text == "background"


def decode_image(data: bytes, field: str) -> Image.Image:
    """An uploaded image as RGB or RGBA, upright. Its size is checked before a pixel is decoded. Raises ApiError."""
    if len(data) > MAX_IMAGE_BYTES:
        raise ApiError(413, field, f"over {MAX_IMAGE_BYTES} bytes", MAX_IMAGE_BYTES)
    with _decoders:
        return _decode_image(data, field)


def _decode_image(data: bytes, field: str) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=list(IMAGE_FORMATS))
        if max(image.size) > MAX_IMAGE_SIDE:
            size = f"{image.width} x {image.height} pixels"
            raise ApiError(422, field, size, f"{MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE} pixels")
        image.load()
        transparent = "A" in image.getbands() or "transparency" in image.info
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # of which convert() would take the lowest 255 of 65535 levels
            image = image.point(lambda level: level * (1 / 256)).convert("L")
        image = image.convert("RGBA" if transparent else "RGB")
    except ApiError:
        raise
    except Image.DecompressionBombError:
        limit = f"{MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE} pixels"
        raise ApiError(422, field, "far more pixels than allowed", limit) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise ApiError(422, field, "not a readable image", list(IMAGE_FORMATS)) from error
    image.thumbnail((KEPT_IMAGE_SIDE, KEPT_IMAGE_SIDE))
    return image


class ScoreRequest(BaseModel):
    """What the public validators send to have a splat scored. Fields that they add later are ignored."""

    model_config = ConfigDict(strict=True)

    prompt: str = ""
    prompt_image: str = Field("", max_length=MAX_IMAGE_BYTES * 4 // 3 + 4, description="base64")
    data: str = Field(max_length=MAX_DATA_CHARACTERS, description="the splat in base64")
    compression: Annotated[int, Field(ge=0, le=2, description="0 none (PLY), 1 zstd, 2 spz")] = 0
    generate_single_preview: bool = Field(False, description="accepted; previews are not made here")
    generate_grid_preview: bool = Field(False, description="accepted; previews are not made here")
    preview_score_threshold: float = 0.8


async def read_score_request(request: Request) -> ScoreRequest:
    """The JSON body of a scoring request, its fields' types and sizes checked. Raises ApiError."""
    _check_content_type(request, ("application/json",))
    try:
        async with asyncio.timeout(MAX_READ_S):
            body = await request.body()
    except TimeoutError:
        raise ApiError(408, "body", f"the request's body took longer than {MAX_READ_S:.0f} s", MAX_READ_S) from None
    try:
        return await asyncio.to_thread(ScoreRequest.model_validate_json, body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, "body", "not JSON") from None
        limit = {key: value for key, value in first.get("ctx", {}).items() if isinstance(value, int | float)}
        field = ".".join(str(part) for part in first["loc"]) or "body"
        raise ApiError(422, field, first["msg"], limit or None) from None


def decode_base64(text: str, field: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(422, field, "not base64") from None


def _check_content_type(request: Request, allowed: tuple[str, ...]) -> None:
    header = HeaderMessage()
    header["content-type"] = request.headers.get("content-type", "none/none")
    if header.get_content_type() not in allowed:
        message = f"content type {escape(request.headers.get('content-type', '(none)')[:64])} is not supported"
        raise ApiError(415, "content-type", message, list(allowed))
    if header.get_content_charset("utf-8") not in ("utf-8", "utf8"):
        raise ApiError(415, "content-type", "the charset must be utf-8", "utf-8")
