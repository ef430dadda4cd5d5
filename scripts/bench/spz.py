"""Measure packing and unpacking of `.spz`, and writing the PLY, on one thread: `python scripts/bench/spz.py [POINTS]`.

The subnet's C++ encoder took 0.18 s to pack and 0.12 s to unpack 500,000 points on two cores of a server.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy is imported: what is measured is one thread.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import ply, spz
from generation.splats.ply import read, write

POINTS = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
REPEATS = 7


def make_splat(sh_degree: int) -> bytes:
    """A PLY of POINTS Gaussians whose values are spread about as in a real splat."""
    rng = np.random.default_rng(0)
    names = ply.columns(sh_degree)
    table = np.zeros((POINTS, len(names)), dtype=np.float32)
    table[:, 0:3] = rng.normal(0, 0.3, (POINTS, 3))
    table[:, 6:9] = rng.normal(0, 1, (POINTS, 3))
    table[:, 9:-8] = rng.normal(0, 0.2, (POINTS, ply.SH_VALUES[sh_degree]))
    table[:, -8] = rng.normal(0, 3, POINTS)
    table[:, -7:-4] = rng.normal(-5, 1, (POINTS, 3))
    table[:, -4:] = rng.normal(size=(POINTS, 4))
    return ply.write(ply.Vertices(names, table))


def seconds(function: Callable[[Any], bytes], data: Any) -> tuple[float, float]:
    """The shortest and the median run."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(data)
        times.append(time.perf_counter() - start)
    return min(times), sorted(times)[REPEATS // 2]


def main() -> None:
    print(f"{POINTS:,} points, {REPEATS} runs, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("SH degree   pack: best, median     unpack: best, median   write PLY: best, median   size")
    for sh_degree in range(len(ply.SH_VALUES)):
        splat = make_splat(sh_degree)
        packed = spz.compress(splat)
        pack, unpack = seconds(spz.compress, splat), seconds(spz.decompress, packed)
        written = seconds(write, read(splat))
        print(
            f"{sh_degree:9d}   {pack[0]:.3f} s, {pack[1]:.3f} s       {unpack[0]:.3f} s, {unpack[1]:.3f} s"
            f"       {written[0]:.3f} s, {written[1]:.3f} s          {len(packed) / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    main()
