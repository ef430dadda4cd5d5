"""Intake of HTTP requests: all limits on bodies, and all checks of their content."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import secrets
import unicodedata
from contextlib import aclosing, suppress
from email.message import Message as HeaderMessage
from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import Request
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.log_lines import escape
from generation.schema import results
from generation.web.errors import ApiError
from generation.web.pictures import IMAGE_FORMATS, MAX_IMAGE_BYTES, Picture, decode

MAX_PROMPT_CHARACTERS = 1024
MAX_SEED = 2**32 - 1
MAX_CANDIDATES = 64
MAX_BUDGET_S = 1800.0
MAX_REQUEST_ID_CHARACTERS = 64
PRIORITIES = ("interactive", "background")
MAX_DATA_CHARACTERS = 64 * 1024 * 1024  # a splat in base64
MAX_TEXT_BYTES = 32 * 1024  # of a form's text field as it is sent; the longest prompt takes 12 kB
MAX_FORM_BYTES = MAX_IMAGE_BYTES + 1024 * 1024
MAX_JSON_BYTES = MAX_DATA_CHARACTERS + MAX_IMAGE_BYTES * 4 // 3 + 1024 * 1024
# A scoring request has some ten values. Its 79 MB of empty lists took 48 s, in which nothing else runs, and 4 GB.
MAX_JSON_COMMAS = 10_000
MAX_READ_S = 60.0  # to receive a whole body
MAX_HELD_BYTES = 512 * 1024 * 1024  # of all bodies together that are being received or checked
HELD_RETRY_S = 5
# Bytes beyond a limit that are still read before an answer closes the connection.
DRAIN_BYTES = 256 * 1024 * 1024
FORM_FIELDS = ("prompt", "prompt_image_file", "seed", "candidates", "budget_seconds")
MAX_FIELDS = 16
NOT_ENCODED = ("7bit", "8bit", "binary")  # the transfer encodings that change nothing
UTF8 = ("utf-8", "utf8", "us-ascii")  # charsets whose text is
UNKNOWN_TYPES = ("application/octet-stream", "binary/octet-stream")  # what clients send for a file of any kind


class BodyLimit:
    """ASGI middleware: a body beyond its path's limit is read no further and answered with 413.

    So is, with 503, one that brings all that are held beyond MAX_HELD_BYTES. A body is held until its request ends, or
    ``read_form`` has made a picture of it.

    Where the answer closes the connection it waits until the body has come, or MAX_READ_S are over: a client that is
    still sending, as Python's urllib is, would see a reset and not the answer.
    """

    def __init__(self, app: ASGIApp, limits: dict[str, int], default: int) -> None:
        self.app, self.limits, self.default = app, limits, default
        self._held = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limits.get(scope["path"].rstrip("/"), self.default)
        headers = Headers(scope=scope)
        closes = scope["http_version"] == "1.0" or "close" in headers.get("connection", "").lower()
        # A client that expects 100 Continue sends nothing before it is asked to.
        goes_on = "expect" not in headers and ("content-length" in headers or "transfer-encoding" in headers)
        size, until = 0, asyncio.get_running_loop().time() + MAX_READ_S
        held = 0

        async def counted() -> Message:
            nonlocal size, goes_on
            message = await receive()
            size += len(message.get("body", b""))
            goes_on = message.get("more_body", False)
            return message

        async def bounded() -> Message:
            nonlocal held
            message = await counted()
            if size > limit:
                raise ApiError(413, "body", f"the request's body is over {limit} bytes", limit)
            came = len(message.get("body", b""))
            self._held, held = self._held + came, held + came
            if self._held > MAX_HELD_BYTES:
                reason = f"over {MAX_HELD_BYTES} bytes of several requests are being received"
                raise ApiError(503, "body", reason, MAX_HELD_BYTES, HELD_RETRY_S)
            return message

        def let_go() -> None:
            nonlocal held
            self._held, held = self._held - held, 0

        async def answer(message: Message) -> None:
            if closes and message["type"] == "http.response.start":
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        while goes_on and size < limit + DRAIN_BYTES:
                            await counted()
            await send(message)

        scope["let_body_go"] = let_go
        try:
            await self.app(scope, bounded, answer)
        finally:
            let_go()


async def read_form(request: Request, threshold: float, background: bool) -> results.Request:
    """The checked request of a form, with a random seed if none is given. Raises ApiError naming field and limit.

    ``threshold``: lowest score worth submitting, 0..1. ``background``: as ``check_priority`` says.
    """
    kind = _check_content_type(request, ("multipart/form-data", "application/x-www-form-urlencoded"))
    try:
        async with asyncio.timeout(MAX_READ_S):
            form = await (_read_multipart if kind == "multipart/form-data" else _read_urlencoded)(request)
    except TimeoutError:
        raise ApiError(408, "body", f"the request's body took longer than {MAX_READ_S:.0f} s", MAX_READ_S) from None
    except MultiPartException as error:
        if "exceeded maximum size" in error.message:
            raise _too_long() from None
        raise ApiError(400, "body", error.message) from None
    try:
        prompt, picture, seed = await _check_form(form)
        candidates = check_whole(_text(form, "candidates"), "candidates", 1, MAX_CANDIDATES) or 1
        budget = check_budget(_text(form, "budget_seconds"))
    finally:
        await form.close()
        request.scope["let_body_go"]()
    return results.Request(
        prompt=prompt,
        image=picture and picture.image,
        target=picture and picture.target,
        seed=secrets.randbits(32) if seed is None else seed,
        threshold=threshold,
        background=background,
        candidates=candidates,
        budget_seconds=budget,
    )


async def _read_multipart(request: Request) -> FormData:
    async with aclosing(request.stream()) as stream:
        parser = _Multipart(
            request.headers, stream, max_files=len(FORM_FIELDS), max_fields=MAX_FIELDS, max_part_size=MAX_TEXT_BYTES
        )
        form = await parser.parse()
    if not parser.has_ended:
        await form.close()
        raise ApiError(400, "body", "cut off: its closing boundary is missing")
    return form


class _Multipart(MultiPartParser):
    """Refuses what Starlette would take for another prompt, or do without.

    It takes text that is not UTF-8 for Latin-1, reads encoded parts as they are, and drops a part that is cut off.
    """

    spool_max_size = MAX_FORM_BYTES  # uploads stay in memory: the disk may be full
    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        for name, value in self._current_part.item_headers:
            encoding = value.decode("latin-1").strip().lower()
            if name == b"content-transfer-encoding" and encoding not in NOT_ENCODED:
                message = f"content transfer encoding {escape(encoding[:64])} is not supported"
                raise ApiError(415, escape(self._current_part.field_name[:64]), message, list(NOT_ENCODED))

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            for name, value in part.item_headers:
                if name == b"content-type" and _charset(value.decode("latin-1")) not in UTF8:
                    raise ApiError(415, escape(part.field_name[:64]), "its charset must be utf-8", "utf-8")
            _decode(bytes(part.data), part.field_name)
        super().on_part_end()


async def _read_urlencoded(request: Request) -> FormData:
    """As a browser's parser reads it (https://url.spec.whatwg.org/#urlencoded-parsing), but for what is not UTF-8.

    That is refused. Starlette's own takes bytes that are not escaped, as curl -d sends them, for Latin-1.
    """
    pairs = (await request.body()).split(b"&", MAX_FIELDS)
    if len(pairs) > MAX_FIELDS:
        raise ApiError(400, "body", f"more than {MAX_FIELDS} fields", MAX_FIELDS)
    items: list[tuple[str, str | UploadFile]] = []
    for pair in filter(None, pairs):
        if len(pair) > 3 * MAX_TEXT_BYTES:
            raise _too_long()
        name, _, value = (unquote_to_bytes(part.replace(b"+", b" ")) for part in pair.partition(b"="))
        key = _decode(name, "body")
        items.append((key, _decode(value, key)))
    return FormData(items)


def _decode(text: bytes, field: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{text[error.start]:02X} at {error.start}"
        raise ApiError(422, escape(field[:64]), f"not UTF-8: {where}", "utf-8") from None


def _too_long() -> ApiError:
    message = f"over {MAX_PROMPT_CHARACTERS} characters: a text field is over {MAX_TEXT_BYTES} bytes"
    return ApiError(422, "prompt", message, MAX_PROMPT_CHARACTERS)


async def _check_form(form: FormData) -> tuple[str | None, Picture | None, int | None]:
    for name in form:
        if name not in FORM_FIELDS:
            known = ", ".join(FORM_FIELDS)
            raise ApiError(422, escape(name[:64]), f"unknown field; known are {known}", list(FORM_FIELDS))
        if len(form.getlist(name)) > 1:
            raise ApiError(422, name, "given more than once", 1)
    seed = check_whole(_text(form, "seed"), "seed", 0, MAX_SEED)
    upload = form.get("prompt_image_file")
    if isinstance(upload, UploadFile) and (upload.filename or upload.size):
        text = _text(form, "prompt")
        if text is not None and text.strip():
            raise ApiError(422, "prompt", "give either prompt or prompt_image_file, not both", 1)
        # The content is looked at anyway, and pictures go by many names: image/jpg, image/pjpeg, image/x-png.
        declared = (upload.content_type or "").partition(";")[0].strip().lower()
        if not declared.startswith("image/") and declared not in ("", *UNKNOWN_TYPES):
            raise ApiError(415, "prompt_image_file", f"content type {escape(declared[:64])}", [*IMAGE_FORMATS.values()])
        data = await upload.read(MAX_IMAGE_BYTES + 1)
        return None, await decode(data, "prompt_image_file"), seed
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


def check_whole(text: str | None, field: str, least: int, most: int) -> int | None:
    """A whole number, None if not given. Raises ApiError unless it is in ``least`` to ``most``."""
    if text is None or not text.strip():
        return None
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()) or not least <= int(text) <= most:
        limit = f"{least}..{most}"
        raise ApiError(422, field, f"not a whole number in {limit}: {escape(text[:32])}", limit)
    return int(text)


def check_budget(text: str | None) -> float | None:
    """The budget in seconds, None if not given. Raises ApiError unless it is over 0 and at most MAX_BUDGET_S."""
    if text is None or not text.strip():
        return None
    number = re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,3})?", text.strip())
    if number and 0 < (seconds := float(text)) <= MAX_BUDGET_S:
        return seconds
    limit = f"over 0, up to {MAX_BUDGET_S:g}"
    raise ApiError(422, "budget_seconds", f"not a number of seconds {limit}: {escape(text[:32])}", limit)


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


class ScoreRequest(BaseModel):
    """What the public validators send to have a splat scored. Fields that they add later are ignored."""

    model_config = ConfigDict(strict=True)

    prompt: str | None = None
    prompt_image: str | None = Field(None, max_length=MAX_IMAGE_BYTES * 4 // 3 + 4, description="base64")
    data: str = Field(max_length=MAX_DATA_CHARACTERS, description="the splat in base64")
    compression: Annotated[int, Field(ge=0, le=2, description="0 none (PLY), 1 zstd, 2 spz")] = 0
    generate_single_preview: bool = Field(
        False,
        validation_alias=AliasChoices("generate_single_preview", "generate_preview"),
        description="send a view as PNG",
    )
    generate_grid_preview: bool = Field(False, description="send the four views that duels are judged on, as PNG")
    preview_score_threshold: float = Field(0.6, description="previews are sent for scores above it")


async def read_score_request(request: Request) -> ScoreRequest:
    """The JSON body of a scoring request, its fields' types and sizes checked. Raises ApiError."""
    _check_content_type(request, ("application/json",))
    try:
        async with asyncio.timeout(MAX_READ_S):
            body = await request.body()
    except TimeoutError:
        raise ApiError(408, "body", f"the request's body took longer than {MAX_READ_S:.0f} s", MAX_READ_S) from None
    if body.count(b",") > MAX_JSON_COMMAS:
        raise ApiError(422, "body", "far more values than a scoring request has", MAX_JSON_COMMAS)
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
    """The bytes of a base64 field. Raises ApiError naming the field."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(422, field, "not base64") from None


def _check_content_type(request: Request, allowed: tuple[str, ...]) -> str:
    """That of the request, in small letters, without parameters. Raises ApiError, also for an encoded body."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        message = f"content encoding {escape(encoding[:64])} is not supported"
        raise ApiError(415, "content-encoding", message, ["identity"])
    header = HeaderMessage()
    header["content-type"] = request.headers.get("content-type", "none/none")
    kind = header.get_content_type()
    if kind not in allowed:
        message = f"content type {escape(request.headers.get('content-type', '(none)')[:64])} is not supported"
        raise ApiError(415, "content-type", message, list(allowed))
    if header.get_content_charset("utf-8") not in UTF8:
        raise ApiError(415, "content-type", "the charset must be utf-8", "utf-8")
    return kind


def _charset(content_type: str) -> str:
    header = HeaderMessage()
    header["content-type"] = content_type
    return header.get_content_charset("utf-8")
