"""Gaussian-splat PLY files (3D Gaussian Splatting layout) as plain numpy columns.

Only what subnet 17's own reader takes: `binary_little_endian 1.0`, one `vertex` element, every property a `float`,
and `ply`, `format binary_little_endian 1.0`, `element vertex N` as exactly the first three lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 2_000_000
MAX_HEADER_BYTES = 16_384
# f_rest_* columns for spherical harmonics of degree 0..3: (degree + 1)^2 - 1 coefficients in each of 3 colours.
SH_VALUES = (0, 9, 24, 45)

_MAGIC_LINES = (b"ply", b"format binary_little_endian 1.0")
_VERTEX_LINE = re.compile(rb"element vertex (0|[1-9][0-9]{0,11})")
_PROPERTY_LINE = re.compile(rb"property float ([A-Za-z0-9_]{1,64})")

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Vertices:
    """The vertices of a PLY: `table` is (N, len(names)) float32, one column per property."""

    names: tuple[str, ...]
    table: Float32Array

    def columns(self, *names: str) -> Float32Array:
        """(N, len(names)) copy of those columns, whatever is in them. Raises ValueError for a missing one."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise ValueError(f"PLY: property {missing[0]!r} is missing")
        return np.take(self.table, [self.names.index(name) for name in names], axis=1)

    def block(self, *names: str) -> Float32Array:
        """(N, len(names)) copy of those columns. Raises ValueError for a missing or non-finite one."""
        block = self.columns(*names)
        if not np.isfinite(block).all():
            raise ValueError(f"PLY: a value of {', '.join(names[:4])} is not finite")
        return block

    @property
    def sh_degree(self) -> int:
        """Degree that the f_rest_* columns make up. Raises ValueError for a count that is no degree's."""
        rest = sum(name.startswith("f_rest_") for name in self.names)
        if rest not in SH_VALUES:
            raise ValueError(f"PLY: {rest} f_rest properties, expected one of {SH_VALUES}")
        return SH_VALUES.index(rest)


def columns(sh_degree: int) -> tuple[str, ...]:
    """Property names of a splat with `sh_degree`, in the order in which they are written."""
    return (
        *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"),
        *(f"f_rest_{i}" for i in range(SH_VALUES[sh_degree])),
        *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
    )


def read(data: bytes, max_points: int = MAX_POINTS) -> Vertices:
    """The vertices, as a view into `data`.

    Raises ValueError, which says what is wrong, for anything but a complete PLY of at most `max_points` vertices.
    """
    end = data.find(b"end_header\n", 0, MAX_HEADER_BYTES)
    if end < 0:
        raise ValueError(f"PLY: no end_header within the first {MAX_HEADER_BYTES} bytes")
    lines = data[:end].split(b"\n")[:-1]
    if tuple(lines[:2]) != _MAGIC_LINES:
        raise ValueError("PLY: the first two lines must be 'ply' and 'format binary_little_endian 1.0'")
    vertex = _VERTEX_LINE.fullmatch(lines[2]) if len(lines) > 2 else None
    if vertex is None:
        raise ValueError("PLY: the third line must be 'element vertex N'")
    count = int(vertex[1])
    if count > max_points:
        raise ValueError(f"PLY: {count} vertices, the limit is {max_points}")
    names = []
    for line in lines[3:]:
        prop = _PROPERTY_LINE.fullmatch(line)
        if prop is None:
            raise ValueError(f"PLY: expected 'property float <name>', found {line[:80]!r}")
        names.append(prop[1].decode())
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"PLY: property {twice[0]!r} is declared twice")
    body = memoryview(data)[end + len(b"end_header\n") :]
    expected = 4 * count * len(names)
    if len(body) != expected:
        raise ValueError(f"PLY: {len(body)} bytes of vertices, the header promises {expected}")
    return Vertices(tuple(names), np.frombuffer(body, dtype="<f4").reshape(count, len(names)))


def write(vertices: Vertices) -> bytes:
    """The PLY, its properties in the order of `vertices.names`."""
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices.table)}"]
    header += [f"property float {name}" for name in vertices.names]
    table = np.ascontiguousarray(vertices.table, dtype="<f4")
    return b"".join((("\n".join(header) + "\nend_header\n").encode(), table.data))
