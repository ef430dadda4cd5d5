"""common.spz: the packed bytes against vectors worked out by hand, the round trip, and hostile input."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common import ply, spz

ROOT = Path(__file__).parents[3]
PLY_MAGIC = b"ply\nformat binary_little_endian 1.0\n"


def make_ply(rows: list[dict[str, float]], sh_degree: int = 0) -> bytes:
    names = ply.columns(sh_degree)
    defaults = {"rot_0": 1.0}
    table = np.array([[row.get(name, defaults.get(name, 0.0)) for name in names] for row in rows], dtype=np.float32)
    return ply.write(ply.Vertices(names, table.reshape(len(rows), len(names))))


def packed_bytes(*attributes: str) -> bytes:
    return bytes.fromhex(" ".join(attributes))


def unpacked(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


def frame(
    count: int, body: bytes, sh_degree: int = 0, version: int = 2, magic: int = 0x5053474E, bits: int = 12
) -> bytes:
    header = struct.pack("<IIIBBBB", magic, version, count, sh_degree, bits, 0, 0)
    return zstandard.ZstdCompressor().compress(header + body)


def test_vector_of_one_point() -> None:
    point = {
        "x": 1.0, "y": -1.0, "z": 0.5,  # 4096 = 00 10 00; -4096 = 00 f0 ff; 2048 = 00 08 00
        "opacity": 0.0,  # 255 * 0.5 = 127.5 -> 128
        "f_dc_0": 0.0, "f_dc_1": 1.0, "f_dc_2": -10.0,  # 127.5 -> 128; 38.25 + 127.5 = 165.75 -> 166; clamped
        "scale_0": -10.0, "scale_1": -5.0, "scale_2": 6.0,  # 0; 80; 256 clamped to 255
        "rot_0": -2.0, "rot_1": 0.0, "rot_2": 0.0, "rot_3": 2.0,  # w < 0: negated; z = -sqrt(1/2) -> 37.3 -> 37
    }  # fmt: skip
    assert unpacked(spz.compress(make_ply([point]))) == packed_bytes(
        "4e475350 02000000 01000000 00 0c 00 00",  # magic 'NGSP', version 2, 1 point, degree 0, 12 fractional bits
        "001000 00f0ff 000800",
        "80",
        "80 a6 00",
        "00 50 ff",
        "80 80 25",
    )


def test_attributes_follow_each_other_for_all_points() -> None:
    rows = [{"x": 1 / 4096, "opacity": 20.0, "scale_0": -10.0}, {"z": -1 / 4096, "opacity": -20.0, "scale_1": -9.0}]
    assert unpacked(spz.compress(make_ply(rows)))[16:] == packed_bytes(
        "010000 000000 000000  000000 000000 ffffff",
        "ff 00",
        "80 80 80  80 80 80",
        "00 a0 a0  a0 10 a0",
        "80 80 80  80 80 80",
    )


def test_rounding_is_half_away_from_zero() -> None:
    half, below = 0.5 / 4096, np.nextafter(np.float32(0.5), np.float32(0)) / 4096
    body = unpacked(spz.compress(make_ply([{"x": half, "y": -half, "z": below}, {"x": -below, "y": 1.5 / 4096}])))[16:]
    assert body[:18] == bytes.fromhex("010000 ffffff 000000  000000 020000 000000")


def test_bytes_are_rounded_half_away_from_zero_too() -> None:
    scales = {f"scale_{i}": -10 + halves / 16 for i, halves in enumerate((0.5, 1.5, 2.5))}
    assert unpacked(spz.compress(make_ply([scales])))[16 + 13 : 16 + 16] == bytes([1, 2, 3])


def test_sh_is_rounded_half_away_from_zero_before_it_is_bucketed() -> None:
    # round(-4.5) = -5: 123, of which 120 is nearest; -4 would be 124, a tie that goes up to 128. Degree 2 likewise,
    # where buckets are 16 wide: -9 is 119, nearest to 112.
    packed = unpacked(spz.compress(make_ply([{"f_rest_0": -4.5 / 128, "f_rest_3": -8.5 / 128}], sh_degree=2)))
    assert packed[16 + 19] == 120
    assert packed[16 + 19 + 9] == 112


def test_positions_are_clamped_to_24_bits() -> None:
    body = unpacked(spz.compress(make_ply([{"x": 1e6, "y": -1e6, "z": 2047.75}])))[16:]
    assert body[:9] == bytes.fromhex("ffff7f 000080 00fc7f")


def test_sh_is_coefficient_outer_and_bucketed() -> None:
    # The PLY holds 3 coefficients of red, then of green, then of blue; each packed value is (round(x * 128) + 128)
    # moved to the nearest multiple of 8 (ties up).
    rest = {
        "f_rest_0": 0.0, "f_rest_1": 0.25, "f_rest_2": 1.0,  # 128; 160; 256 -> 255
        "f_rest_3": -1.0, "f_rest_4": 3 / 128, "f_rest_5": 4 / 128,  # 0; 131 -> 128; 132 -> 136
        "f_rest_6": -4 / 128, "f_rest_7": -5 / 128, "f_rest_8": 0.97,  # 124 -> 128; 123 -> 120; 252 -> 256 -> 255
    }  # fmt: skip
    packed = unpacked(spz.compress(make_ply([rest], sh_degree=1)))
    assert packed[12] == 1
    assert packed[16 + 19 :] == bytes([128, 0, 128, 160, 128, 120, 255, 136, 255])


def test_sh_above_degree_one_keeps_four_bits() -> None:
    # Degree 2: 8 coefficients a colour. Coefficient 3 is the first one of degree 2.
    rest = {"f_rest_2": 4 / 128, "f_rest_3": 7 / 128, "f_rest_11": 8 / 128, "f_rest_19": -9 / 128}
    packed = unpacked(spz.compress(make_ply([rest], sh_degree=2)))[16 + 19 :]
    assert packed[6] == 136  # coefficient 2, red: buckets of 8
    assert list(packed[9:12]) == [128, 144, 112]  # coefficient 3: buckets of 16, (119 + 8) // 16 * 16 = 112


def test_empty_splat_round_trips() -> None:
    empty = make_ply([])
    assert spz.decompress(spz.compress(empty)) == empty


def test_decoding_by_hand() -> None:
    body = packed_bytes("001000 00f0ff ffff7f", "00", "80 a6 00", "00 50 ff", "80 80 25")
    out = ply.read(spz.decompress(frame(1, body)))
    np.testing.assert_allclose(out.block("x", "y", "z")[0], [1, -1, 8388607 / 4096])
    assert -14 < out.block("opacity")[0, 0] < -13  # finite, and still invisible
    np.testing.assert_allclose(
        out.block("f_dc_0", "f_dc_1")[0], [(128 / 255 - 0.5) / 0.15, (166 / 255 - 0.5) / 0.15], atol=1e-6
    )
    np.testing.assert_allclose(out.block("scale_0", "scale_1", "scale_2")[0], [-10, -5, 255 / 16 - 10])
    quaternion = out.block("rot_0", "rot_1", "rot_2", "rot_3")[0]
    np.testing.assert_allclose(np.linalg.norm(quaternion), 1, atol=1e-6)
    np.testing.assert_allclose(quaternion[3], 37 / 127.5 - 1, atol=1e-6)


def random_splat(count: int, sh_degree: int, seed: int) -> ply.Vertices:
    """Values within what each attribute can hold."""
    rng = np.random.default_rng(seed)
    names = ply.columns(sh_degree)
    rest = ply.SH_VALUES[sh_degree]
    table = np.zeros((count, len(names)), dtype=np.float32)
    table[:, 0:3] = rng.uniform(-2000, 2000, (count, 3))
    table[:, 6:9] = rng.uniform(-3.3, 3.3, (count, 3))
    table[:, 9 : 9 + rest] = rng.uniform(-0.99, 0.9, (count, rest))
    table[:, -8] = rng.uniform(-12, 12, count)
    table[:, -7:-4] = rng.uniform(-10, 5.9, (count, 3))
    table[:, -4:] = rng.normal(size=(count, 4))
    return ply.Vertices(names, table)


def assert_within_the_quantisation_steps(before: ply.Vertices, after: ply.Vertices) -> None:
    assert (after.names, after.table.shape) == (before.names, before.table.shape)

    def difference(*columns: str) -> np.ndarray:
        return np.abs(after.block(*columns) - before.block(*columns))

    assert (difference("x", "y", "z") <= 0.5 / 4096 + 1e-6).all()
    assert (difference("f_dc_0", "f_dc_1", "f_dc_2") <= 0.5 / 255 / 0.15 + 1e-5).all()
    assert (difference("scale_0", "scale_1", "scale_2") <= 0.5 / 16 + 1e-5).all()
    sigmoid = [1 / (1 + np.exp(-v.block("opacity").astype(np.float64))) for v in (before, after)]
    assert (np.abs(sigmoid[0] - sigmoid[1]) <= 0.5 / 255 + 1e-6).all()
    rest = ply.SH_VALUES[before.sh_degree]
    for i in range(rest):
        step = 8 if i % (rest // 3) < 3 else 16
        assert (difference(f"f_rest_{i}") <= (0.5 + step / 2) / 128 + 1e-6).all()
    rotations = [v.block("rot_0", "rot_1", "rot_2", "rot_3").astype(np.float64) for v in (before, after)]
    unit = rotations[0] / np.linalg.norm(rotations[0], axis=1, keepdims=True)
    unit *= np.where(unit[:, :1] < 0, -1, 1)
    assert (np.abs(unit[:, 1:] - rotations[1][:, 1:]) <= 0.5 / 127.5 + 1e-6).all()
    assert (rotations[1][:, 0] >= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_round_trip_stays_within_the_quantisation_step(count: int, sh_degree: int, seed: int) -> None:
    before = random_splat(count, sh_degree, seed)
    assert_within_the_quantisation_steps(before, ply.read(spz.decompress(spz.compress(ply.write(before)))))


@pytest.mark.parametrize(
    ("count", "sh_degree"), [(1_000_000, 0), pytest.param(1_000_000, 3, marks=pytest.mark.slow), (500_000, 1)]
)
def test_large_splats_round_trip(count: int, sh_degree: int) -> None:
    before = random_splat(count, sh_degree, seed=0)
    assert_within_the_quantisation_steps(before, ply.read(spz.decompress(spz.compress(ply.write(before)))))


@pytest.mark.parametrize("count", [spz._BLOCK - 1, spz._BLOCK, spz._BLOCK + 1, 2 * spz._BLOCK])
def test_points_are_packed_alike_in_every_block(count: int) -> None:
    splat = random_splat(count, sh_degree=1, seed=count)
    whole = unpacked(spz.compress(ply.write(splat)))[16:]
    sections = np.split(np.frombuffer(whole, dtype=np.uint8), np.cumsum([count * w for w in (9, 1, 3, 3, 3)]))
    for i in {0, spz._BLOCK - 2, count - 1}:
        alone = unpacked(spz.compress(ply.write(ply.Vertices(splat.names, splat.table[i : i + 1]))))[16:]
        assert b"".join(section.reshape(count, -1)[i].tobytes() for section in sections) == alone


@pytest.mark.filterwarnings("error")
@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=26, max_size=26))
def test_any_finite_values_are_packed(values: list[float]) -> None:
    names = ply.columns(1)
    data = ply.write(ply.Vertices(names, np.array([values], dtype=np.float32)))
    once = spz.decompress(spz.compress(data))
    # What was out of range has been clamped, so nothing moves any more; rotations too long for a w of 0 are an example.
    assert np.isfinite(ply.read(once).table).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_a_packed_splat_is_a_fixed_point(sh_degree: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    width = 19 + ply.SH_VALUES[sh_degree]
    body = bytearray(rng.integers(0, 256, count * width, dtype=np.uint8).tobytes())
    # Rotations longer than one have no quaternion, and SH bytes between buckets are never written: leave both out.
    body[16 * count :] = bytes([128]) * (len(body) - 16 * count)
    once = spz.decompress(frame(count, bytes(body), sh_degree))
    assert unpacked(spz.compress(once))[16:] == bytes(body)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^spz: "):
        spz.decompress(data)
    with pytest.raises(ValueError, match=r"^PLY: "):
        spz.compress(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(1, bytes(18)), "truncated"),
        (frame(1, bytes(20)), "goes on after"),
        (frame(1, bytes(19), magic=1), "magic"),
        (frame(1, bytes(19), version=3), "version 3"),
        (frame(1, bytes(19), sh_degree=4), "SH degree 4"),
        (frame(1, bytes(19), bits=24), "fractional bits"),
        (frame(10**9, b""), "1000000000 points, the limit is 2000000"),
        (frame(100, bytes(1900))[:-20], "truncated|readable"),
        (b"", "truncated|readable"),
    ],
)
def test_malformed_frames_say_why(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spz.decompress(data)


HOSTILE_INPUT_IN_BOUNDED_MEMORY = r"""
import resource, struct, sys
import zstandard
from common import ply, spz

PLY_START = b"ply\nformat binary_little_endian 1.0\n"

def header(count, sh_degree=0):
    return struct.pack("<IIIBBBB", 0x5053474E, 2, count, sh_degree, 12, 0, 0)

def frame(content):
    return zstandard.ZstdCompressor().compress(content)

def frame_with_window(log, content):
    return struct.pack("<IBB", 0xFD2FB528, 0, (log - 10) << 3) + struct.pack("<I", 1 | len(content) << 3)[:3] + content

def bomb(start, size):
    compressor = zstandard.ZstdCompressor().compressobj()
    parts = [compressor.compress(start)] + [compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, compressor.flush()])

inputs = {
    "a bomb of 1 GB": (bomb(header(1000), 1 << 30), "goes on after"),
    "2,000,000 points claimed, none there": (frame(header(ply.MAX_POINTS, 3)), "truncated"),
    "10^9 points claimed": (frame(header(10**9)), "the limit is"),
    "a window of 2 GB": (frame_with_window(31, header(1) + bytes(19)), "readable"),
    "a content size of 2^62 claimed": (struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 62), "readable"),
    "a PLY of 10^11 vertices": (PLY_START + b"element vertex 99999999999\nend_header\n", "the limit is"),
}
assert spz.decompress(frame_with_window(20, header(1) + bytes(19)))  # the frame as such is a good one
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, (data, message) in inputs.items():
    try:
        (spz.compress if data.startswith(b"ply") else spz.decompress)(data)
    except ValueError as error:
        assert message in str(error), (name, error)
    else:
        raise AssertionError(name)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < 64, f"{name}: {grown} MB"
"""


def test_hostile_input_costs_bounded_memory() -> None:
    """In a process of its own: zstd's memory is not Python's, so that only the peak of the whole process tells."""
    subprocess.run([sys.executable, "-c", HOSTILE_INPUT_IN_BOUNDED_MEMORY], cwd=ROOT, check=True, timeout=60)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_splats_are_refused_or_read_but_never_break(data: st.DataObject) -> None:
    good = spz.compress(ply.write(random_splat(20, sh_degree=1, seed=0)))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(1, len(damaged))) :]
    refusal = ""
    try:
        read = ply.read(spz.decompress(bytes(damaged)))
    except ValueError as error:
        refusal = str(error)
    assert refusal.startswith("spz: ") if refusal else len(read.table) <= ply.MAX_POINTS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "opacity", "rot_2", "f_rest_4"])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        spz.compress(make_ply([{name: value}], sh_degree=1))


def test_a_quaternion_of_zero_length_counts_as_no_rotation() -> None:
    assert unpacked(spz.compress(make_ply([{"rot_0": 0.0}])))[-3:] == bytes([128, 128, 128])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ply\nformat ascii 1.0\nelement vertex 0\nend_header\n", "first two lines"),
        (PLY_MAGIC + b"comment x\nelement vertex 0\nend_header\n", "third line"),
        (PLY_MAGIC + b"element vertex 1\nproperty double x\nend_header\n", "property float"),
        (PLY_MAGIC + b"element vertex 2\nproperty float x\nend_header\n\0\0\0\0", "promises 8"),
        (PLY_MAGIC + b"element vertex 999999999\nproperty float x\nend_header\n", "the limit is"),
        (PLY_MAGIC + b"element vertex 0\nproperty float x\nproperty float x\nend_header\n", "twice"),
        (PLY_MAGIC + b"element vertex 0\nproperty float x\nend_header\n", "'y' is missing"),
        (b"ply\n" + b"x" * 20_000, "no end_header"),
    ],
)
def test_malformed_plys_say_why(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spz.compress(data)


def test_a_count_of_sh_values_that_is_no_degree_is_refused() -> None:
    names = (*ply.columns(0), "f_rest_0")
    with pytest.raises(ValueError, match="f_rest"):
        spz.compress(ply.write(ply.Vertices(names, np.ones((1, len(names)), dtype=np.float32))))


def test_properties_are_found_by_name() -> None:
    names = ply.columns(0)
    table = np.random.default_rng(0).normal(size=(5, len(names))).astype(np.float32)
    shuffled = np.random.default_rng(1).permutation(len(names))
    reordered = ply.Vertices(tuple(names[i] for i in shuffled), table[:, shuffled])
    assert spz.compress(ply.write(reordered)) == spz.compress(ply.write(ply.Vertices(names, table)))
