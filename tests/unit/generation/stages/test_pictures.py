"""Pictures as prompts: what is read, as what, and what is refused with which words."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from generation.schema.results import Request
from generation.web.errors import ApiError
from generation.web.pictures import Picture, decode_image
from tests.support.fleet_harness import running
from tests.support.service_harness import Service, serving

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def bands(image: Image.Image, place: tuple[int, int]) -> tuple[int, ...]:
    """The values of a pixel of an image of several bands."""
    values = image.getpixel(place)
    assert isinstance(values, tuple)
    return values


def read(data: bytes) -> Picture:
    return decode_image(data, "picture")


def left_red(mode: str = "RGB", size: tuple[int, int] = (6, 4), right: Any = BLUE) -> Image.Image:
    """Red on the left, ``right`` on the right."""
    image = Image.new("RGB" if len(right) == 3 else "RGBA", size, right)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def rotated_by_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(left_red(size=(32, 16)), "JPEG", quality=95, exif=exif)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, depth: int, colour: int, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG by its specification: ``samples`` (H, W, C) of ``depth`` bits, chunks before and after its pixels."""
    height, width, _ = samples.shape
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=-1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(pixels)), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# EXIF 2.3, tag 274, from 1: the sides of the picture that are the first row and the first column of what is stored.
SIDES = (
    "top left", "top right", "bottom right", "bottom left", "left top", "right top", "right bottom", "left bottom",
)  # fmt: skip
WHOLE = np.tile(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), (8, 4, 1))  # of red and blue columns


class TestTargets:
    """The self-check's target is the picture as a validator opens it. Values: its steps under its Pillow, 10.0.0."""

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_an_orientation_is_not_looked_at(self, orientation: int) -> None:
        target = read(rotated_by_exif(orientation)).target
        assert (target.mode, target.size) == ("RGB", (32, 16))
        assert bands(target, (4, 8))[0] > 200 > 50 > bands(target, (4, 8))[2]

    def test_four_bands_are_put_on_white(self) -> None:
        half = left_red("RGBA", right=(0, 0, 255, 128))
        for data in (encoded(half), encoded(half, "WEBP", lossless=True, exact=True)):
            assert read(data).target.getpixel((5, 2)) == (127, 127, 255)
        assert read(encoded(left_red("RGBA", right=(0, 0, 255, 0)))).target.getpixel((5, 2)) == WHITE

    def test_other_transparency_is_not_looked_at(self) -> None:
        grey = Image.merge("LA", (Image.new("L", (6, 4), 70), Image.new("L", (6, 4), 100)))
        assert read(encoded(grey)).target.getpixel((0, 0)) == (70, 70, 70)
        palette = left_red().quantize(4)
        clear = palette.getpixel((0, 0))
        assert read(encoded(palette, transparency=clear)).target.getpixel((0, 0)) == RED
        assert read(encoded(left_red(), transparency=RED)).target.getpixel((0, 0)) == RED

    def test_sixteen_bits_are_clipped(self) -> None:
        deep = Image.new("I;16", (2, 1), 255)
        deep.putpixel((1, 0), 256)
        target = read(encoded(deep)).target
        assert [target.getpixel((x, 0)) for x in (0, 1)] == [WHITE, WHITE]
        assert read(encoded(Image.new("I;16", (2, 1), 254))).target.getpixel((0, 0)) == (254, 254, 254)

    def test_inks_are_opaque(self) -> None:
        target = read(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).target
        assert bands(target, (8, 8))[0] > 250
        assert max(bands(target, (8, 8))[1:]) < 5

    def test_a_large_one_keeps_its_size(self) -> None:
        picture = read(encoded(Image.new("RGB", (3000, 40), RED)))
        assert (picture.target.size, picture.image.size[0]) == ((3000, 40), 2048)

    async def test_an_engine_process_gets_it(self, tmp_path) -> None:
        async with running(tmp_path, ("first",)) as fleet:
            image, target = Image.new("RGBA", (3, 2)), Image.new("RGB", (30, 20))
            request = Request(image=image, target=target, seed=5, threshold=0.6)
            assert (await fleet.generate(request)).ply.endswith(b"RGBA (3, 2) RGB (30, 20) 5")


class TestTransparency:
    """Whatever way a file says so: what is transparent is, and the colours of all else are kept."""

    @pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
    @pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
    def test_a_level_of_grey(self, depth: int, share: float) -> None:
        most = 2**depth - 1
        clear, other = round(share * most), round((1 - share) * most) if share != 0.4 else most
        if clear == other:
            clear = 0
        samples = np.array([[[clear], [other]]])
        near = max(clear - 1, 0) if depth == 16 else clear  # one of the same 8 bits is another level
        samples = np.concatenate([samples, [[[near], [other]]]])
        image = read(png(samples, depth, 0, chunk(b"tRNS", struct.pack(">H", clear)))).image
        assert image.mode == "RGBA"
        assert bands(image, (0, 0))[3] == 0
        assert bands(image, (1, 0))[3] == 255
        shown = other >> 8 if depth == 16 else other * 255 // most
        assert bands(image, (1, 0))[:3] == (shown,) * 3
        assert (bands(image, (0, 1))[3] == 0) == (near == clear)

    def test_unused_bits_of_the_level_do_not_count(self) -> None:
        image = read(png(np.array([[[1], [3]]]), 2, 0, chunk(b"tRNS", b"\xff\xfd"))).image
        assert [bands(image, (x, 0))[3] for x in (0, 1)] == [0, 255]

    @pytest.mark.parametrize("depth", [8, 16])
    def test_a_colour(self, depth: int) -> None:
        clear, other = (200, 100, 50), (200, 100, 51)  # which differ in the lowest bits of 16
        samples = np.array([[clear, other, (0, 0, 0)]])
        image = read(png(samples, depth, 2, chunk(b"tRNS", struct.pack(">HHH", *clear)))).image
        assert [bands(image, (x, 0))[3] for x in range(3)] == [0, 255, 255]

    def test_a_palette(self) -> None:
        colours = chunk(b"PLTE", bytes([*RED, *BLUE, *WHITE]))
        for depth in (2, 4, 8):
            data = png(np.array([[[0], [1], [2]]]), depth, 3, colours, chunk(b"tRNS", bytes([0, 128])))
            image = read(data).image
            assert [bands(image, (x, 0))[3] for x in range(3)] == [0, 128, 255]
            assert bands(image, (1, 0))[:3] == BLUE

    @pytest.mark.parametrize("colour", [0, 2])
    def test_a_level_that_no_pixel_has_makes_nothing_transparent(self, colour: int) -> None:
        clear = chunk(b"tRNS", struct.pack(">HHH", 40_000, 40_000, 40_000)[: 2 if colour == 0 else 6])
        picture = read(png(np.full((4, 4, 1 if colour == 0 else 3), 30_000), 16, colour, clear))
        assert picture.image.mode == "RGB"
        assert not picture.image.has_transparency_data
        assert picture.image.convert("RGBA").getchannel("A").getextrema() == (255, 255)

    @pytest.mark.parametrize("depth", [8, 16])
    def test_grey_and_alpha(self, depth: int) -> None:
        full = 2**depth - 1
        image = read(png(np.array([[[0, 0], [full, full]]]), depth, 4)).image
        assert (bands(image, (0, 0))[3], image.getpixel((1, 0))) == (0, (255,) * 4)

    def test_webp(self) -> None:
        image = read(encoded(left_red("RGBA", right=(0, 0, 255, 0)), "WEBP", lossless=True)).image
        assert (image.getpixel((0, 0)), bands(image, (5, 0))[3]) == ((*RED, 255), 0)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_the_first_picture_of_an_animation(self, kind: str) -> None:
        frames = [left_red("RGBA", right=(0, 0, 255, 0)), Image.new("RGBA", (6, 4), "green")]
        image = read(encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)).image
        assert (image.getpixel((0, 0)), bands(image, (5, 0))[3]) == ((*RED, 255), 0)

    def test_alpha_that_is_full_is_none(self) -> None:
        for data in (encoded(left_red("RGBA")), encoded(left_red("RGBA"), "WEBP"), encoded(left_red("LA"))):
            assert read(data).image.mode == "RGB"

    @pytest.mark.parametrize("most", [0, 12])
    def test_a_picture_of_nothing_is_refused(self, most: int) -> None:
        """A 4xx: the miner hands in nothing then, and tries no other seed."""
        nothing = Image.new("RGBA", (20, 20), (255, 0, 0, most))
        for data in (
            encoded(nothing),
            encoded(nothing, "WEBP", lossless=True, exact=True),
            encoded(Image.new("LA", (4, 4), (7, most))),
            png(np.full((4, 4, 1), 1), 2, 0, chunk(b"tRNS", b"\0\1")),
        ):
            with pytest.raises(ApiError, match="nothing is visible"):
                read(data)


class TestOrientation:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize(
        ("orientation", "sides"),
        list(enumerate(SIDES, 1)),
    )
    def test_all_eight(self, orientation: int, sides: str, kind: str) -> None:
        upright = np.full((40, 60, 3), 255, np.uint8)
        upright[:12, :12] = RED  # top left
        upright[:12, -12:] = BLUE  # top right
        first_row, first_column = sides.split()
        stored = upright
        if first_row in ("left", "right"):  # what is stored in a row is a column of the picture
            stored = stored.swapaxes(0, 1)
        if first_row in ("bottom", "right"):
            stored = stored[::-1]
        if first_column in ("bottom", "right"):
            stored = stored[:, ::-1]
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = read(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, quality=95)).image
        assert image.size == (60, 40)
        assert bands(image, (4, 4))[0] > 200 > bands(image, (4, 4))[2]
        assert bands(image, (55, 4))[2] > 200 > bands(image, (55, 4))[0]

    @pytest.mark.parametrize(
        "content",
        [
            b"\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0",  # without the header of a TIFF
            b"MM\0*\0\0\0\x08\xff\xff\x01\x12",
            b"MM\0*\xff\xff\xff\xff",
            b"",
        ],
    )
    def test_broken_metadata_is_no_reason_to_lose_a_picture(self, content: bytes) -> None:
        for data in (
            png(WHOLE, 8, 2, chunk(b"eXIf", content)),
            png(WHOLE, 8, 2, after=chunk(b"eXIf", content)),
            encoded(Image.fromarray(WHOLE), "JPEG", exif=b"Exif\0\0" + content),
            encoded(Image.fromarray(WHOLE), "WEBP", exif=content or b"x"),
        ):
            assert read(data).image.size == (8, 8)

    @pytest.mark.parametrize("value", [0, 9, 65535])
    def test_an_orientation_that_does_not_exist_is_none(self, value: int) -> None:
        assert read(rotated_by_exif(value)).image.size == (32, 16)


class TestColours:
    def test_inks(self) -> None:
        image = read(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).image
        assert image.mode == "RGB"
        assert bands(image, (8, 8))[0] > 250 > 5 > bands(image, (8, 8))[1]

    def test_pictures_of_a_camera_with_more_than_one(self) -> None:
        data = encoded(left_red(size=(32, 16)), "MPO", save_all=True, append_images=[left_red(size=(32, 16))])
        assert read(data).image.size == (32, 16)

    @pytest.mark.parametrize("colour", [2, 6])
    def test_sixteen_bits_a_channel(self, colour: int) -> None:
        samples = np.array([[[65535, 32768, 256, 65535][: 3 if colour == 2 else 4]]])
        assert read(png(samples, 16, colour)).image.getpixel((0, 0)) == (255, 128, 1)


class TestRefusals:
    """What is wrong with the file is said."""

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (b"", "the file is empty"),
            (b"GIF89a....", "its content is none of PNG, JPEG, WEBP"),
            (png(WHOLE, 8, 2)[:45], "truncated in chunk IDAT: 4 of"),
            (png(WHOLE, 8, 2)[:36], "truncated: it ends before its IEND chunk"),
            (png(WHOLE, 8, 2)[:20], "truncated in chunk IHDR: 4 of 13 bytes"),
            (png(WHOLE, 8, 2, chunk(b"tEXt", b"a\0b")[:-1] + b"?"), "the checksum of chunk tEXt is wrong"),
            (
                png(WHOLE, 8, 2, chunk(b"iTXt", b"XML\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))),
                "chunk iTXt can not be read",
            ),
            (png(WHOLE, 8, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000)))), "chunk zTXt can not be"),
            (png(WHOLE, 8, 2, chunk(b"iCCP", b"a\0\1..")), "chunk iCCP can not be read"),
            (png(WHOLE, 8, 2, chunk(b"gAMA", b"\0")), "chunk gAMA can not be read"),
            (png(WHOLE, 8, 2, after=chunk(b"pHYs", b"\0")), "chunk pHYs can not be read"),
            (png(WHOLE, 8, 2).replace(b"IDAT", b"IDAt"), "the checksum of chunk IDAt is wrong"),
            (encoded(Image.fromarray(WHOLE), "JPEG")[:-40], "truncated: its end of image is missing"),
            (encoded(Image.fromarray(WHOLE), "WEBP")[:-4], "truncated: "),
        ],
    )
    def test_of_a_file(self, data: bytes, words: str) -> None:
        with pytest.raises(ApiError, match="not a readable image: ") as refused:
            read(data)
        assert words in str(refused.value)
        assert refused.value.status == 422


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 400), st.binary(min_size=1, max_size=8), st.booleans())
def test_any_damage_is_read_or_refused(kind: str, place: int, instead: bytes, cut: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(left_red("RGB", size=(8, 6)), kind, exif=exif)
    place %= len(data)
    damaged = data[:place] + instead + (b"" if cut else data[place + len(instead) :])
    with suppress(ApiError):
        picture = read(damaged)
        assert picture.image.mode in ("RGB", "RGBA")
        assert picture.target.mode == "RGB"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def upload(service: Service, data: bytes, kind: str) -> httpx.Response:
    return service.client.post("/generate/", files={"prompt_image_file": ("a", data, kind)}, data={"seed": "1"})


@pytest.mark.parametrize("kind", ["image/jpg", "image/pjpeg", "image/x-png", "image/png; x=y", "IMAGE/JPEG", "image/*"])
def test_a_picture_goes_by_many_names(service: Service, kind: str) -> None:
    answer = upload(service, encoded(Image.fromarray(WHOLE), "JPEG"), kind)
    assert (answer.status_code, answer.content) == (200, b"ply\nRGB (8, 8) 1")
    assert upload(service, b"GIF89a", "image/gif").status_code == 422
    assert upload(service, encoded(Image.fromarray(WHOLE)), "text/html").status_code == 415


URLENCODED = "application/x-www-form-urlencoded"


def post(service: Service, body: bytes, kind: str = URLENCODED) -> httpx.Response:
    return service.client.post("/generate/", content=body + b"&seed=1", headers={"content-type": kind})


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ("prompt=ein grüner Würfel".encode(), "ein grüner Würfel"),  # what curl -d sends
        ("prompt=木 \U0001f996".encode(), "木 \U0001f996"),
        (b"prompt=ein+gr%C3%BCner+W%c3%bcrfel", "ein grüner Würfel"),
        (b"prompt=a%20red%2Bblue%20cube%26%3D", "a red+blue cube&="),
        (b"prompt=50% off, 100%zz", "50% off, 100%zz"),
        (b"prompt=a=b;c", "a=b;c"),
        (b"&&prompt=a&", "a"),
    ],
)
def test_a_form_in_a_line_gives_its_prompt(service: Service, body: bytes, prompt: str) -> None:
    answer = post(service, body)
    assert (answer.status_code, answer.content) == (200, f"ply\n{prompt} 1".encode())


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ("prompt=ein grüner Würfel".encode("latin-1"), "prompt", "not UTF-8: byte 0xFC at 6"),
        (b"prompt=gr%FCn", "prompt", "not UTF-8: byte 0xFC at 2"),
        ("prompt=зелёный".encode("cp1251"), "prompt", "not UTF-8"),
        (b"prompt=%ED%A0%80", "prompt", "not UTF-8"),  # half of a surrogate pair
        (b"prompt=salt & pepper", " pepper", "unknown field"),
        (b"pr\xfcmpt=a", "body", "not UTF-8"),
        (b"prompt=a&prompt=b", "prompt", "more than once"),
        (b"&".join(b"%d=" % i for i in range(16)), "body", "more than 16 fields"),
    ],
)
def test_a_form_in_a_line_that_would_give_another_prompt_is_refused(
    service: Service, body: bytes, field: str, words: str
) -> None:
    answer = post(service, body)
    assert answer.status_code in (400, 422)
    refused = answer.json()["error"]
    assert refused["field"] == field
    assert words in refused["message"]


def parts(text: bytes, *headers: bytes) -> bytes:
    lines = [b'Content-Disposition: form-data; name="prompt"', *headers, b"", text]
    seed = b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n'
    return seed + b"--b\r\n" + b"\r\n".join(lines) + b"\r\n--b--\r\n"


@pytest.mark.parametrize(
    ("text", "headers", "status"),
    [
        ("grün".encode(), (), 200),
        ("grün".encode(), (b"Content-Type: text/plain; charset=UTF-8",), 200),
        ("grün".encode(), (b"Content-Type: text/plain",), 200),
        ("grün".encode("latin-1"), (), 422),
        ("grün".encode("latin-1"), (b"Content-Type: text/plain; charset=iso-8859-1",), 415),
        ("зелёный".encode("cp1251"), (b"content-type: text/plain; charset=cp1251",), 415),
    ],
)
def test_a_form_of_parts_gives_its_prompt_or_is_refused(
    service: Service, text: bytes, headers: tuple[bytes, ...], status: int
) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = service.client.post("/generate/", content=parts(text, *headers), headers=kind)
    assert answer.status_code == status, answer.text
    if status == 200:
        assert answer.content == b"ply\n" + text + b" 1"
    else:
        assert answer.json()["error"]["field"] == "prompt"
