"""Intake of HTTP requests: all limits on bodies, and all checks of their content."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import secrets
import threading
import traceback
import unicodedata
import zlib
from contextlib import aclosing
from email.message import Message as HeaderMessage
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np
from fastapi import Request
from PIL import ExifTags, Image, PngImagePlugin
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.log_lines import escape
from generation.schema import results

MAX_PROMPT_CHARACTERS = 1024
MAX_SEED = 2**32 - 1
MAX_CANDIDATES = 64
MAX_BUDGET_S = 1800.0
MAX_REQUEST_ID_CHARACTERS = 64
PRIORITIES = ("interactive", "background")
MAX_IMAGE_BYTES = 10 * 1024 * 1024
MAX_IMAGE_SIDE = 4096  # pixels
IMAGE_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
# A scan of a JPEG may cover 4096 x 4096 pixels in 33 bytes and takes 7 ms: an upload of them takes a core for half an
# hour (LJT-01-003 of libjpeg-turbo, which leaves the limit to its users). Real files have about ten.
MAX_JPEG_SCANS = 500
MAX_DATA_CHARACTERS = 64 * 1024 * 1024  # a splat in base64
MAX_TEXT_BYTES = 32 * 1024  # of a form's text field as it is sent; the longest prompt takes 12 kB
MAX_FORM_BYTES = MAX_IMAGE_BYTES + 1024 * 1024
MAX_JSON_BYTES = MAX_DATA_CHARACTERS + MAX_IMAGE_BYTES * 4 // 3 + 1024 * 1024
MAX_READ_S = 60.0  # to receive a whole body
# Bytes that are still read beyond a limit: otherwise a client that is sending sees a reset and not the answer.
DRAIN_BYTES = 256 * 1024 * 1024
FORM_FIELDS = ("prompt", "prompt_image_file", "seed", "candidates", "budget_seconds")
MAX_FIELDS = 16
UTF8 = ("utf-8", "utf8", "us-ascii")  # charsets whose text is
UNKNOWN_TYPES = ("application/octet-stream", "binary/octet-stream")  # what clients send for a file of any kind
# Larger than any stage needs. Uploads of 4096 x 4096 must not wait in the queue at full size.
KEPT_IMAGE_SIDE = 2048
LEAST_VISIBLE = 13  # of 255: a picture without a pixel of this alpha shows nothing
_decoders = threading.Semaphore(2)  # an image at full size takes 64 MB
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # no stuffed byte, no restart
_GREY_MOST = {"1": 1, "L;2": 3, "L;4": 15, "L": 255}  # the highest level, by Pillow's layouts
_TURNS = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture(NamedTuple):
    """An image prompt, decoded."""

    image: Image.Image  # to work on: upright, RGBA where anything is transparent, else RGB, at most KEPT_IMAGE_SIDE
    target: Image.Image  # to be compared with, RGB: what a validator makes of the same file, at its own size


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
        raise HTTPException(400, error.message) from None
    try:
        prompt, picture, seed = await _check_form(form)
        candidates = check_candidates(_text(form, "candidates"))
        budget = check_budget(_text(form, "budget_seconds"))
    finally:
        await form.close()
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
        return await _Multipart(
            request.headers, stream, max_files=len(FORM_FIELDS), max_fields=MAX_FIELDS, max_part_size=MAX_TEXT_BYTES
        ).parse()


class _Multipart(MultiPartParser):
    """Text that is not UTF-8 is refused: Starlette would take it for Latin-1, and a prompt for another one."""

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
    seed = check_seed(_text(form, "seed"))
    upload = form.get("prompt_image_file")
    if isinstance(upload, UploadFile) and upload.filename:
        text = _text(form, "prompt")
        if text is not None and text.strip():
            raise ApiError(422, "prompt", "give either prompt or prompt_image_file, not both", 1)
        # The content is looked at anyway, and pictures go by many names: image/jpg, image/pjpeg, image/x-png.
        declared = (upload.content_type or "").partition(";")[0].strip().lower()
        if not declared.startswith("image/") and declared not in ("", *UNKNOWN_TYPES):
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
    """The seed, None if not given. Raises ApiError unless it is an integer of 32 bits."""
    if text is None or not text.strip():
        return None
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()) or int(text) > MAX_SEED:
        raise ApiError(422, "seed", f"not a whole number in 0..{MAX_SEED}: {escape(text[:32])}", f"0..{MAX_SEED}")
    return int(text)


def check_candidates(text: str | None) -> int:
    """The number of candidates, 1 if not given. Raises ApiError unless it is an integer from 1 to MAX_CANDIDATES."""
    if text is None or not text.strip():
        return 1
    if not re.fullmatch(r"[0-9]{1,10}", text.strip()) or not 1 <= int(text) <= MAX_CANDIDATES:
        limit = f"1..{MAX_CANDIDATES}"
        raise ApiError(422, "candidates", f"not a whole number in {limit}: {escape(text[:32])}", limit)
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


def decode_image(data: bytes, field: str) -> Picture:
    """An uploaded picture. Its size is checked before a pixel is decoded. Raises ApiError."""
    if len(data) > MAX_IMAGE_BYTES:
        raise ApiError(413, field, f"over {MAX_IMAGE_BYTES} bytes", MAX_IMAGE_BYTES)
    with _decoders:
        return _decode_image(data, field)


def _decode_image(data: bytes, field: str) -> Picture:
    if data.startswith(_JPEG) and (scans := _jpeg_scans(data)) > MAX_JPEG_SCANS:
        raise ApiError(422, field, f"a JPEG of {scans} scans", MAX_JPEG_SCANS)
    try:
        image = Image.open(io.BytesIO(data), formats=list(IMAGE_FORMATS))
        if max(image.size) > MAX_IMAGE_SIDE:
            size = f"{image.width} x {image.height} pixels"
            raise ApiError(422, field, size, f"{MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE} pixels")
        layout = image.tile[0][3] if image.tile else None
        image.load()
        picture = Picture(_upright(_colours(image, layout, data), image), as_validators_open(image))
    except ApiError:
        raise
    except Image.DecompressionBombError:
        limit = f"{MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE} pixels"
        raise ApiError(422, field, "far more pixels than allowed", limit) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise ApiError(422, field, f"not a readable image: {what_is_wrong(data)}", list(IMAGE_FORMATS)) from error
    for each in picture:
        each.info.clear()  # of no use from here on: profiles, metadata, a transparent level of another depth
    picture.image.thumbnail((KEPT_IMAGE_SIDE, KEPT_IMAGE_SIDE))
    if picture.image.mode == "RGBA" and not any(picture.image.getchannel("A").histogram()[LEAST_VISIBLE:]):
        least = f"a pixel with an alpha of {LEAST_VISIBLE} of 255"
        raise ApiError(422, field, "nothing is visible in it: all of it is transparent", least)
    return picture


def _jpeg_scans(data: bytes) -> int:
    """How often pixels begin, at least as often as libjpeg sees it: what follows the end of the image is read, too."""
    scans, position = 0, len(_JPEG) - 1
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        marker, position = found[1][0], found.end()
        if marker not in (0x01, 0xD8, 0xD9):  # which have no content
            scans += marker == 0xDA
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return scans


def _colours(image: Image.Image, layout: Any, data: bytes) -> Image.Image:
    """A loaded picture as RGB, or as RGBA where anything in it is transparent. ``layout``: Pillow's of its pixels.

    A PNG may name one level or colour as transparent. It is one of the file's own depth, which Pillow scales to 8 bits.
    """
    clear = image.info.get("transparency")
    mask = None
    if isinstance(clear, int) and layout == "I;16B":
        mask = np.asarray(image) == clear
    elif isinstance(clear, int) and layout in _GREY_MOST:
        most = _GREY_MOST[layout]
        mask = np.asarray(image.convert("L")) == (clear & most) * 255 // most
    elif isinstance(clear, tuple) and layout in ("RGB", "RGB;16B"):
        high, low = [level >> 8 for level in clear], [level & 255 for level in clear]
        mask = (np.asarray(image) == (low if layout == "RGB" else high)).all(-1)
        if layout == "RGB;16B":
            mask &= (_low_bytes(data) == low).all(-1)
    if image.mode.startswith("I"):  # of which convert() would take the lowest 255 of 65535 levels
        image = image.point(lambda level: level * (1 / 256)).convert("L")
    if mask is not None:
        image = image.convert("RGB")
        image.putalpha(Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if any(image.getchannel("A").histogram()[:255]):
            return image
    return image.convert("RGB")


def _low_bytes(data: bytes) -> np.ndarray:
    """(H, W, 3) of a PNG of 3 x 16 bits, of which Pillow reads the high bytes."""
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    return np.asarray(image)


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Turned by the EXIF orientation of the file; as it is where that can not be read."""
    try:
        turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata is no reason to lose a picture
        turn = None
    return image if turn is None else image.transpose(turn)


def what_is_wrong(data: bytes) -> str:
    """Why a file can not be decoded, in words."""
    if not data:
        return "the file is empty"
    if data.startswith(_PNG):
        return _broken_chunk(data) or _refused_chunk(data) or "its pixels can not be decompressed"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        size = int.from_bytes(data[4:8], "little") + 8
        return f"truncated: {len(data)} of {size} bytes" if size > len(data) else "a WEBP that can not be decoded"
    if data.startswith(b"\xff\xd8"):
        whole = data.rstrip(b"\0").endswith(b"\xff\xd9")
        return "a JPEG that can not be decoded" if whole else "truncated: its end of image is missing"
    return f"its content is none of {', '.join(IMAGE_FORMATS)}"


def _broken_chunk(data: bytes) -> str | None:
    """The first chunk of a PNG that is cut short or damaged."""
    start = len(_PNG)
    while True:
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if len(kind) < 4:
            return "truncated: it ends before its IEND chunk"
        if not kind.isalpha():
            return f"no chunk begins at byte {start}"
        name, end = kind.decode("ascii"), start + 8 + length
        if end + 4 > len(data):
            return f"truncated in chunk {name}: {max(0, len(data) - start - 8)} of {length} bytes"
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return f"the checksum of chunk {name} is wrong"
        if name == "IEND":
            return None
        start = end + 4


def _refused_chunk(data: bytes) -> str | None:
    """The chunk of a PNG that Pillow's reader fails at, and how."""
    try:
        PngImagePlugin.PngImageFile(io.BytesIO(data)).load()
    except Exception as error:
        failure: BaseException | None = error
        while failure is not None:
            for frame, _ in traceback.walk_tb(failure.__traceback__):
                if (name := frame.f_code.co_name).startswith("chunk_"):
                    return f"chunk {name.removeprefix('chunk_')} can not be read ({escape(str(failure)[:100])})"
            failure = failure.__cause__ or failure.__context__
    return None


def as_validators_open(image: Image.Image) -> Image.Image:
    """An opened file as RGB, as the public validators have it.

    With four bands it is put on white, and nothing else is looked at: neither EXIF's orientation nor the transparency
    of a palette or of grey.
    """
    if len(image.getbands()) == 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


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
    """That of the request, in small letters, without parameters."""
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
