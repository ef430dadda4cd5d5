"""Pictures as prompts: what is read, as what, and what is refused with which words."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from generation.intake import Picture, decode_image
from tests.fleet_harness import running

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


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


class TestTargets:
    """The self-check's target is the picture as a validator opens it. Values: its steps under its Pillow, 10.0.0."""

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_an_orientation_is_not_looked_at(self, orientation: int) -> None:
        target = read(rotated_by_exif(orientation)).target
        assert (target.mode, target.size) == ("RGB", (32, 16))
        assert target.getpixel((4, 8))[0] > 200 > 50 > target.getpixel((4, 8))[2]

    def test_four_bands_are_put_on_white(self) -> None:
        half = left_red("RGBA", right=(0, 0, 255, 128))
        for data in (encoded(half), encoded(half, "WEBP", lossless=True, exact=True)):
            assert read(data).target.getpixel((5, 2)) == (127, 127, 255)
        assert read(encoded(left_red("RGBA", right=(0, 0, 255, 0)))).target.getpixel((5, 2)) == WHITE

    def test_other_transparency_is_not_looked_at(self) -> None:
        grey = Image.merge("LA", (Image.new("L", (6, 4), 70), Image.new("L", (6, 4), 1)))
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
        assert target.getpixel((8, 8))[0] > 250 and max(target.getpixel((8, 8))[1:]) < 5

    def test_a_large_one_keeps_its_size(self) -> None:
        picture = read(encoded(Image.new("RGB", (3000, 40), RED)))
        assert (picture.target.size, picture.image.size[0]) == ((3000, 40), 2048)

    async def test_an_engine_process_gets_it(self, tmp_path) -> None:
        async with running(tmp_path, ("first",)) as fleet:
            image, target = Image.new("RGBA", (3, 2)), Image.new("RGB", (30, 20))
            assert (await fleet.generate(None, image, 5, None, target)).ply.endswith(b"RGBA (3, 2) RGB (30, 20) 5")
