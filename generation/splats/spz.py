"""Gaussians from the subnet's packed splats, for scoring what a miner submits. The format stands in ``common.spz``."""

from __future__ import annotations

from common import spz
from generation.splats.gaussians import Gaussians
from generation.splats.ply import from_vertices


def decode(data: bytes, max_gaussians: int = 2_000_000) -> Gaussians:
    """Unpack a compressed .spz. Raises ValueError naming what is wrong with ``data``."""
    return from_vertices(spz.unpack(data, max_gaussians))
