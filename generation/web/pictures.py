"""Uploaded pictures: limits, decoding, and what a validator makes of the same file."""

from __future__ import annotations

import asyncio
import io
import re
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from common.log_lines import escape
from generation.web.errors import ApiError

MAX_IMAGE_BYTES = 10 * 1024 * 1024
MAX_IMAGE_SIDE = 4096  # pixels
IMAGE_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
# A scan of a JPEG may cover 4096 x 4096 pixels in 33 bytes and takes 7 ms: an upload of them takes a core for half an
# hour (LJT-01-003 of libjpeg-turbo, which leaves the limit to its users). Real files have about ten.
MAX_JPEG_SCANS = 500
# Larger than any stage needs: what waits in the queue takes less memory. The score's target keeps its own size.
KEPT_IMAGE_SIDE = 2048
LEAST_VISIBLE = 13  # of 255: a picture without a pixel of this alpha shows nothing
# An image at full size takes 64 MB. The threads are their own, so that nothing else waits for a queue of pictures.
_decoders = ThreadPoolExecutor(2, "decoder")
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # no stuffed byte, no restart; fill bytes may precede it
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


async def decode(data: bytes, field: str) -> Picture:
    """As ``decode_image``, beside the event loop and at most two at a time."""
    return await asyncio.get_running_loop().run_in_executor(_decoders, decode_image, data, field)


def decode_image(data: bytes, field: str) -> Picture:
    """An uploaded picture. Its size is checked before a pixel is decoded. Raises ApiError."""
    if len(data) > MAX_IMAGE_BYTES:
        raise ApiError(413, field, f"over {MAX_IMAGE_BYTES} bytes", MAX_IMAGE_BYTES)
    if data.startswith(_JPEG) and (scans := _jpeg_scans(data)) > MAX_JPEG_SCANS:
        raise ApiError(422, field, f"a JPEG of {scans} scans", MAX_JPEG_SCANS)
    try:
        image = Image.open(io.BytesIO(data), formats=list(IMAGE_FORMATS))
        if max(image.size) > MAX_IMAGE_SIDE:
            size = f"{image.width} x {image.height} pixels"
            raise ApiError(422, field, size, f"{MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE} pixels")
        layout = image.tile[0][3] if image.tile else None
        image.load()
        picture = Picture(_upright(_colours(image, layout, data), image), _as_validators_open(image))
    except ApiError:
        raise
    except Image.DecompressionBombError:
        limit = f"{MAX_IMAGE_SIDE} x {MAX_IMAGE_SIDE} pixels"
        raise ApiError(422, field, "far more pixels than allowed", limit) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        raise ApiError(422, field, f"not a readable image: {_what_is_wrong(data)}", list(IMAGE_FORMATS)) from error
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


def _what_is_wrong(data: bytes) -> str:
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


def _as_validators_open(image: Image.Image) -> Image.Image:
    """An opened file as RGB, as the public validators have it.

    With four bands it is put on white, and nothing else is looked at: neither EXIF's orientation nor the transparency
    of a palette or of grey.
    """
    if len(image.getbands()) == 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
