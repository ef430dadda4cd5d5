"""The PLY of 3DGS: one element `vertex` of float properties, binary little endian.

The header's first three lines are exactly `ply`, `format binary_little_endian 1.0`, `element vertex N`, without
comments, because the subnet's reader wants them so. `f_rest` is channel-major: all of red's coefficients, then green's,
then blue's.
"""

from __future__ import annotations

import numpy as np
import torch

from generation.splats.gaussians import SH_COEFFICIENTS, Gaussians

MAX_HEADER_BYTES = 8192  # a full header with third degree harmonics has about 1,400
_END = b"end_header\n"


def _property_names(coefficients: int) -> list[str]:
    rest = [f"f_rest_{i}" for i in range(3 * (coefficients - 1))]
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", *rest, "opacity"]
    return names + [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]


def write(gaussians: Gaussians) -> bytes:
    """Serialise Gaussians of any spherical harmonics degree. Normals are written as zero."""
    gaussians.check()
    n, coefficients = gaussians.sh.shape[:2]
    names = _property_names(coefficients)
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {n}"]
    lines += [f"property float {name}" for name in names]
    header = ("\n".join(lines) + "\n").encode("ascii") + _END

    sh = gaussians.sh.detach()
    columns = [
        gaussians.means.detach(),
        torch.zeros_like(gaussians.means),
        sh[:, 0],
        sh[:, 1:].transpose(1, 2).flatten(1),
        gaussians.logit_opacities.detach()[:, None],
        gaussians.log_scales.detach(),
        gaussians.quats.detach(),
    ]
    table = torch.cat(columns, 1).cpu()  # put together where they are: one copy from a GPU
    return b"".join((header, table.numpy().astype("<f4", copy=False).data))


def read(data: bytes, max_gaussians: int = 2_000_000) -> Gaussians:
    """Parse what `write` writes: the same properties in any order; normals and `f_rest` may be missing.

    Values are taken as they are, not a number included. Raises ValueError naming what is wrong; memory stays within a
    small multiple of len(data).
    """
    n, names, body = _read_header(data, max_gaussians)
    rest = sum(name.startswith("f_rest_") for name in names)
    if rest % 3 or rest // 3 + 1 not in SH_COEFFICIENTS:
        raise ValueError(f"PLY has {rest} f_rest properties, expected 0, 9, 24 or 45")
    coefficients = rest // 3 + 1
    known = _property_names(coefficients)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"PLY has an unknown property {unknown[0]!r}")
    if missing := [name for name in known if name not in names and name not in ("nx", "ny", "nz")]:
        raise ValueError(f"PLY lacks the property {missing[0]!r}")
    expected = 4 * n * len(names)
    if len(data) - body != expected:
        raise ValueError(f"PLY has {len(data) - body} bytes after the header, expected {expected} for {n} vertices")

    table = np.frombuffer(data, dtype="<f4", offset=body).reshape(n, len(names))
    index = {name: i for i, name in enumerate(names)}

    def columns(*wanted: str) -> torch.Tensor:
        return torch.from_numpy(table[:, [index[name] for name in wanted]].astype(np.float32, copy=False))

    dc = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    higher = columns(*(f"f_rest_{i}" for i in range(rest))).reshape(n, 3, coefficients - 1).transpose(1, 2)
    return Gaussians(
        means=columns("x", "y", "z"),
        quats=columns("rot_0", "rot_1", "rot_2", "rot_3"),
        log_scales=columns("scale_0", "scale_1", "scale_2"),
        logit_opacities=columns("opacity")[:, 0],
        sh=torch.cat([dc, higher], dim=1),
    )


def _read_header(data: bytes, max_gaussians: int) -> tuple[int, list[str], int]:
    """Number of vertices, property names in order, offset of the first vertex."""
    if data[:4] != b"ply\n":
        raise ValueError("not a PLY: the first line is not exactly 'ply'")
    end = data.find(_END, 0, MAX_HEADER_BYTES)
    if end < 0:
        raise ValueError(f"PLY has no end_header line within {MAX_HEADER_BYTES} bytes")
    try:
        lines = data[:end].decode("ascii").split("\n")[:-1]
    except UnicodeDecodeError:
        raise ValueError("PLY header is not ASCII") from None
    if len(lines) < 3 or lines[1] != "format binary_little_endian 1.0":
        raise ValueError("PLY's second line is not exactly 'format binary_little_endian 1.0'")
    keyword, _, count = lines[2].rpartition(" ")
    if keyword != "element vertex" or not count.isdecimal() or len(count) > 12:
        raise ValueError("PLY's third line is not 'element vertex N'")
    if (n := int(count)) > max_gaussians:
        raise ValueError(f"PLY claims {n} vertices, at most {max_gaussians} are accepted")
    names = []
    for line in lines[3:]:
        words = line.split(" ")
        if len(words) != 3 or words[:2] != ["property", "float"]:
            raise ValueError(f"PLY header line {line[:80]!r} is not 'property float NAME'")
        if words[2] in names:
            raise ValueError(f"PLY has the property {words[2][:80]!r} twice")
        names.append(words[2])
    return n, names, end + len(_END)
