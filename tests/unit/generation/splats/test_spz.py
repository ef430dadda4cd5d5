"""The scoring side's .spz decoder, against an encoder written here from the format's table, one point at a time."""

from __future__ import annotations

import contextlib
import math
import struct

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.spz import MAGIC, unzstd
from generation.splats import spz


def frame(body: bytes, n: int, degree: int = 0, magic: int = MAGIC, version: int = 2, bits: int = 12) -> bytes:
    header = struct.pack("<IIIBBBB", magic, version, n, degree, bits, 0, 0)
    return zstandard.ZstdCompressor(level=1).compress(header + body)


def half_away(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def byte(value: float) -> int:
    return min(255, max(0, half_away(value)))


finite = st.floats(-100, 100, width=32)
points = st.lists(
    st.tuples(
        st.tuples(finite, finite, finite),
        st.floats(-6, 6, width=32),  # logit of the opacity
        st.tuples(*[st.floats(-1.5, 1.5, width=32)] * 3),
        st.tuples(*[st.floats(-9, 5, width=32)] * 3),
        st.tuples(*[st.floats(-1, 1, width=32)] * 4).filter(lambda q: sum(x * x for x in q) > 0.01),
        st.tuples(*[st.floats(-0.875, 0.875, width=32)] * 9),
    ),
    max_size=20,
)


@given(points)
@settings(max_examples=60, deadline=None)
def test_decodes_what_the_table_says_within_one_quantisation_step(cloud: list) -> None:
    def unit(q: tuple[float, ...]) -> list[float]:
        norm = math.copysign(math.sqrt(sum(x * x for x in q)), q[0] or 1.0)
        return [x / norm for x in q]

    body = bytearray()
    for xyz, *_ in cloud:
        for value in xyz:
            body += (half_away(value * 4096) & 0xFFFFFF).to_bytes(3, "little")
    for point in cloud:
        body.append(byte(255 / (1 + math.exp(-point[1]))))
    for point in cloud:
        body += bytes(byte(c * 0.15 * 255 + 0.5 * 255) for c in point[2])
    for point in cloud:
        body += bytes(byte((s + 10) * 16) for s in point[3])
    for point in cloud:
        body += bytes(byte(q * 127.5 + 127.5) for q in unit(point[4])[1:])
    for point in cloud:
        body += bytes(byte(half_away(h * 128) + 128) for h in point[5])

    decoded = spz.decode(frame(bytes(body), len(cloud), degree=1))
    decoded.check()
    assert len(decoded) == len(cloud)
    for i, (xyz, logit, colour, scale, quat, harmonics) in enumerate(cloud):
        assert decoded.means[i].tolist() == pytest.approx(xyz, abs=0.5 / 4096 + 1e-5)
        assert torch.sigmoid(decoded.logit_opacities[i]).item() == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.003)
        assert decoded.sh[i, 0].tolist() == pytest.approx(colour, abs=0.51 / 255 / 0.15)
        assert decoded.log_scales[i].tolist() == pytest.approx(scale, abs=0.51 / 16)
        assert decoded.quats[i, 1:].tolist() == pytest.approx(unit(quat)[1:], abs=0.51 / 127.5)
        assert decoded.quats[i].norm().item() == pytest.approx(1, abs=0.02)
        assert decoded.sh[i, 1:].flatten().tolist() == pytest.approx(harmonics, abs=0.51 / 128)


def test_extreme_alphas_stay_finite() -> None:
    body = bytes(18) + b"\x00\xff" + bytes(18)
    decoded = spz.decode(frame(body, 2))
    assert torch.isfinite(decoded.logit_opacities).all()
    assert torch.sigmoid(decoded.logit_opacities[0]) < 0.001
    assert torch.sigmoid(decoded.logit_opacities[1]) > 0.999


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "16 bytes of the header are missing"),
        (b"not zstd at all", "zstd"),
        (frame(b"", 0)[:-3], "zstd|missing"),
        (frame(b"", 0, magic=7), "magic"),
        (frame(b"", 0, version=3), "version 3"),
        (frame(b"", 0xFFFFFFFF), "4294967295 points, the limit is 2000000"),
        (frame(b"", 0, degree=4), "degree"),
        (frame(b"", 0, bits=24), "fractional bits"),
        (frame(bytes(18), 1), "1 bytes of the points are missing"),
        (frame(bytes(20), 1), "goes on after the 1 points"),
    ],
)
def test_broken_input_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spz.decode(data)


def test_bombs_are_not_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(300_000_000))
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        unzstd(bomb, 1000)
    with pytest.raises(ValueError, match="goes on after the 10 points"):
        spz.decode(frame(bytes(300_000_000), 10))


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_a_value_error_or_a_splat(body: bytes) -> None:
    for data in (body, frame(body, len(body) // 19)):
        with contextlib.suppress(ValueError):
            spz.decode(data).check()
