"""Subnet 17's `.spz`: one zstd frame around quantised Gaussians, attribute after attribute.

The layout is Niantic's SPZ version 2, with zstd in the place of gzip. Little endian:

    <u4 magic 0x5053474e> <u4 version 2> <u4 N> <u1 sh_degree> <u1 fractional_bits> <u1 flags> <u1 0>
    positions 9N | alphas N | colours 3N | scales 3N | rotations 3N | SH {0, 9, 24, 45}N

Rounding is half away from zero, in float32, as C's roundf: results are compared byte for byte.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import zstandard
from numpy.typing import NDArray

from common import ply
from common.ply import Float32Array

MAGIC = 0x5053474E
VERSION = 2
FRACTIONAL_BITS = 12
ZSTD_LEVEL = 1
HEADER = struct.Struct("<IIIBBBB")
# What zstd's own decoder allows unless told otherwise; with ply.MAX_POINTS it bounds what a hostile frame can cost.
MAX_WINDOW_BYTES = 1 << 27

_POSITION_LIMIT = (1 << 23) - 1
_COLOUR_SCALE = np.float32(0.15)
_SCALE_OFFSET, _SCALE_STEPS = np.float32(10), np.float32(16)
# Bucket width of a quantised SH value: 5 bits are kept of degree 1 (3 coefficients x 3 colours), 4 bits above.
_SH_DEGREE_1_VALUES = 9
_SH_BUCKET_DEGREE_1, _SH_BUCKET_HIGHER = 8, 16
# Points packed at a time: what is made of them on the way stays in the processor's cache.
_BLOCK = 8192
# Opacities are logits: bytes 0 and 255 would decode to infinities. This still counts as invisible (under 0.001).
_ALPHA_EPSILON = 1e-6

Bytes = NDArray[np.uint8]


def compress(data: bytes) -> bytes:
    """PLY -> `.spz`. Raises ValueError naming what is wrong with the PLY.

    Values outside of an attribute's range are clamped (positions: +-2048 world units).
    """
    vertices = ply.read(data)
    sh_degree = vertices.sh_degree
    count = len(vertices.table)
    widths = _widths(sh_degree)
    packed = bytearray(HEADER.size + count * sum(widths))
    HEADER.pack_into(packed, 0, MAGIC, VERSION, count, sh_degree, FRACTIONAL_BITS, 0, 0)
    body = np.frombuffer(packed, dtype=np.uint8, offset=HEADER.size)
    starts = np.cumsum([count * width for width in widths])[:-1]
    sections = [part.reshape(count, width) for part, width in zip(np.split(body, starts), widths, strict=True)]
    # Once even without points, so that a PLY without the right properties is refused.
    for start in range(0, max(count, 1), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = ply.Vertices(vertices.names, vertices.table[rows])
        # Infinities on the way are clamped like everything that is out of range.
        with np.errstate(over="ignore"):
            for section, values in zip(sections, _pack(block, sh_degree), strict=True):
                section[rows] = values
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(packed)


def decompress(data: bytes, max_points: int = ply.MAX_POINTS) -> bytes:
    """`.spz` -> PLY. Raises ValueError for anything malformed, as `unpack` does."""
    return ply.write(unpack(data, max_points))


def unpack(data: bytes, max_points: int = ply.MAX_POINTS) -> ply.Vertices:
    """`.spz` -> a PLY's columns. Raises ValueError for anything malformed.

    Reads no more than the header promises, and that is at most `max_points`: a bomb costs bounded memory.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(io.BytesIO(data)) as stream:
            header = _read_exactly(stream, HEADER.size, "header")
            magic, version, count, sh_degree, fractional_bits, _flags, _reserved = HEADER.unpack(header)
            if magic != MAGIC:
                raise ValueError(f"spz: magic is {magic:#010x}, expected {MAGIC:#010x}")
            if version != VERSION:
                raise ValueError(f"spz: version {version}, expected {VERSION}")
            if count > max_points:
                raise ValueError(f"spz: {count} points, the limit is {max_points}")
            if sh_degree >= len(ply.SH_VALUES):
                raise ValueError(f"spz: SH degree {sh_degree}, the limit is {len(ply.SH_VALUES) - 1}")
            if fractional_bits > 23:
                raise ValueError(f"spz: {fractional_bits} fractional bits, the limit is 23")
            sections = [
                np.frombuffer(_read_exactly(stream, count * width, "points"), dtype=np.uint8).reshape(count, width)
                for width in _widths(sh_degree)
            ]
            if stream.read(1):
                raise ValueError(f"spz: data goes on after the {count} points of the header")
    except zstandard.ZstdError as error:
        raise ValueError(f"spz: not a readable zstd frame ({error})") from error

    positions, alphas, colours, scales, rotations, harmonics = sections
    table = np.zeros((count, len(ply.columns(sh_degree))), dtype=np.float32)
    # Columns as ply.columns() names them: position, normal (left zero), colour, SH, opacity, scale, rotation.
    table[:, 0:3] = _unpack_positions(positions, fractional_bits)
    table[:, 6:9] = (colours / np.float32(255) - np.float32(0.5)) / _COLOUR_SCALE
    table[:, 9:-8] = _unpack_harmonics(harmonics)
    table[:, -8:-7] = _unpack_alphas(alphas)
    table[:, -7:-4] = scales / _SCALE_STEPS - _SCALE_OFFSET
    table[:, -4:] = _unpack_rotations(rotations)
    return ply.Vertices(ply.columns(sh_degree), table)


def unzstd(data: bytes, limit: int) -> bytes:
    """Decompress one zstd frame. Raises ValueError when it is broken or holds more than `limit` bytes."""
    chunks, size = [], 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(io.BytesIO(data)) as stream:
            while size <= limit and (chunk := stream.read(min(limit + 1 - size, 1 << 20))):
                chunks.append(chunk)
                size += len(chunk)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: {error}") from error
    if size > limit:
        raise ValueError(f"zstd: more than {limit} bytes when decompressed")
    return b"".join(chunks)


def _widths(sh_degree: int) -> tuple[int, ...]:
    """Bytes a point of each section, in the order in which they are packed."""
    return 9, 1, 3, 3, 3, ply.SH_VALUES[sh_degree]


def _pack(vertices: ply.Vertices, sh_degree: int) -> tuple[Bytes, ...]:
    """(N, width) bytes of each section."""
    # The PLY has the harmonics' colours outside and the coefficients inside, the packed form the other way round.
    coefficients = ply.SH_VALUES[sh_degree] // 3
    harmonics = [f"f_rest_{colour * coefficients + i}" for i in range(coefficients) for colour in range(3)]
    positions = vertices.block("x", "y", "z")
    logits = vertices.block("opacity")
    colours = vertices.block("f_dc_0", "f_dc_1", "f_dc_2")
    log_scales = vertices.block("scale_0", "scale_1", "scale_2")
    quaternions = vertices.block("rot_0", "rot_1", "rot_2", "rot_3")
    return (
        _pack_positions(positions),
        _pack_alphas(logits),
        _to_bytes(colours * (_COLOUR_SCALE * np.float32(255)) + np.float32(127.5)),
        _to_bytes((log_scales + _SCALE_OFFSET) * _SCALE_STEPS),
        _pack_rotations(quaternions),
        _pack_harmonics(vertices.block(*harmonics)),
    )


def _read_exactly(stream: zstandard.ZstdDecompressionReader, size: int, what: str) -> bytes:
    chunks = []
    missing = size
    while missing:
        # In steps, so that a short frame that promises many points never gets a large buffer.
        chunk = stream.read(min(missing, 1 << 20))
        if not chunk:
            raise ValueError(f"spz: truncated, {missing} bytes of the {what} are missing")
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)


def _round_half_up(values: Float32Array) -> Float32Array:
    """Half away from zero for values >= 0. Adding 0.5 first would round 0.49999997 up in float32."""
    whole = np.floor(values)
    whole += (values - whole) >= 0.5
    return whole


def _round(values: Float32Array) -> Float32Array:
    return np.copysign(_round_half_up(np.abs(values)), values)


def _to_bytes(values: Float32Array) -> Bytes:
    # Below zero everything clamps to 0, so clipping first leaves only values >= 0 to round.
    return _round_half_up(np.clip(values, 0, 255)).astype(np.uint8)


def _pack_positions(positions: Float32Array) -> Bytes:
    """(N,3) -> (N,9): three 24-bit two's complement fixed-point numbers."""
    scaled = np.clip(positions * np.float32(1 << FRACTIONAL_BITS), -_POSITION_LIMIT - 1, _POSITION_LIMIT)
    words = np.ascontiguousarray(_round(scaled), dtype="<i4")
    return words.view(np.uint8).reshape(len(positions), 3, 4)[:, :, :3].reshape(len(positions), 9)


def _unpack_positions(packed: Bytes, fractional_bits: int) -> Float32Array:
    words = np.zeros((len(packed), 3, 4), dtype=np.uint8)
    # In the upper three bytes, so that the arithmetic shift back extends the sign.
    words[:, :, 1:] = packed.reshape(len(packed), 3, 3)
    return (words.view("<i4")[:, :, 0] >> 8).astype(np.float32) / np.float32(1 << fractional_bits)


def _pack_alphas(logits: Float32Array) -> Bytes:
    return _to_bytes(np.float32(255) / (np.float32(1) + np.exp(-logits)))


def _unpack_alphas(packed: Bytes) -> Float32Array:
    alphas = np.clip(packed / 255.0, _ALPHA_EPSILON, 1 - _ALPHA_EPSILON)
    return np.log(alphas / (1 - alphas)).astype(np.float32)


def _pack_rotations(quaternions: Float32Array) -> Bytes:
    """(N,4) w, x, y, z -> (N,3) x, y, z of the unit quaternion with w >= 0; zero length counts as no rotation."""
    norms = np.sqrt(np.square(quaternions, dtype=np.float64).sum(axis=1))
    vector = np.divide(quaternions[:, 1:], norms[:, None], where=norms[:, None] > 0, out=np.zeros((len(norms), 3)))
    vector[quaternions[:, 0] < 0] *= -1
    return _to_bytes(vector.astype(np.float32) * np.float32(127.5) + np.float32(127.5))


def _unpack_rotations(packed: Bytes) -> Float32Array:
    vector = packed / np.float32(127.5) - np.float32(1)
    w = np.sqrt(np.maximum(0, 1 - np.square(vector).sum(axis=1, keepdims=True)))
    return np.concatenate([w, vector], axis=1)


def _pack_harmonics(harmonics: Float32Array) -> Bytes:
    """(N,3K) -> (N,3K), both coefficient outer, colour inner."""
    buckets = np.full(harmonics.shape[1], _SH_BUCKET_HIGHER, dtype=np.int16)
    buckets[:_SH_DEGREE_1_VALUES] = _SH_BUCKET_DEGREE_1
    # Outside of this range all are 0 or 255 in the end.
    scaled = np.clip(harmonics, -1, 1) * np.float32(128)
    # 0.49999997 + 0.5 is 1 in float32, but that falls into the same bucket as 0.
    scaled += np.copysign(np.float32(0.5), scaled)
    quantised = scaled.astype(np.int16)
    quantised += np.int16(128) + buckets // 2
    # The bucket widths are powers of two: clearing the low bits rounds down to a multiple.
    quantised &= -buckets
    return np.minimum(quantised, 255).astype(np.uint8)


def _unpack_harmonics(packed: Bytes) -> Float32Array:
    count, values = packed.shape
    by_colour = packed.reshape(count, values // 3, 3).swapaxes(1, 2).reshape(count, values)
    return (by_colour - np.float32(128)) / np.float32(128)
