"""Gaussians as the PLY of 3DGS, and back. What the file looks like stands in ``common.ply``."""

from __future__ import annotations

import numpy as np
import torch

from common import ply
from generation.splats.gaussians import SH_COEFFICIENTS, Gaussians


def write(gaussians: Gaussians) -> bytes:
    """Serialise Gaussians of any spherical harmonics degree. Normals are written as zero."""
    gaussians.check()
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
    return ply.write(ply.Vertices(ply.columns(SH_COEFFICIENTS.index(sh.shape[1])), table.numpy()))


def read(data: bytes, max_gaussians: int = ply.MAX_POINTS) -> Gaussians:
    """Parse what `write` writes: the same properties in any order; normals may be missing.

    Values are taken as they are, not a number included. Raises ValueError naming what is wrong; memory stays within a
    small multiple of len(data).
    """
    return from_vertices(ply.read(data, max_gaussians))


def from_vertices(vertices: ply.Vertices) -> Gaussians:
    """Gaussians of a PLY's columns, in their own memory. Raises ValueError for properties that are not a splat's."""
    coefficients = SH_COEFFICIENTS[vertices.sh_degree]
    known = ply.columns(vertices.sh_degree)
    if unknown := [name for name in vertices.names if name not in known]:
        raise ValueError(f"PLY: property {unknown[0]!r} is unknown")

    def columns(*names: str) -> torch.Tensor:
        return torch.from_numpy(vertices.columns(*names).astype(np.float32, copy=False))

    dc = columns("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    rest = columns(*(f"f_rest_{i}" for i in range(3 * (coefficients - 1))))
    higher = rest.reshape(len(rest), 3, coefficients - 1).transpose(1, 2)  # channel-major in the file
    return Gaussians(
        means=columns("x", "y", "z"),
        quats=columns("rot_0", "rot_1", "rot_2", "rot_3"),
        log_scales=columns("scale_0", "scale_1", "scale_2"),
        logit_opacities=columns("opacity")[:, 0],
        sh=torch.cat([dc, higher], dim=1),
    )
