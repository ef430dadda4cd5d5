"""See splats without a viewer: each PLY from eight sides, one row each, as a PNG.

python -m scripts.tools.contact_sheet OUT.png SPLAT.ply [SPLAT.ply ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from generation.splats import ply
from generation.splats.cameras import orbit
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize
from generation.stages.self_check import ELEVATION, FOVY, RADIUS, fit_to_frame

VIEWS = 8
SIZE = 192


@torch.no_grad()
def all_round(gaussians: Gaussians) -> Tensor:
    """Eight views (8, 3, 192, 192) on white, 45 degrees apart, at the validators' camera."""
    cameras = orbit(ELEVATION, torch.arange(VIEWS) * (360.0 / VIEWS), RADIUS, FOVY, SIZE, SIZE)
    rgb, _, _ = rasterize(fit_to_frame(gaussians), cameras, SIZE, SIZE, torch.ones(3))
    return rgb.permute(0, 3, 1, 2).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("splats", type=Path, nargs="+")
    args = parser.parse_args()
    rows, made = [], []
    for path in args.splats:
        try:
            data = path.read_bytes()
            if data:
                rows.append(all_round(ply.read(data)))
                made.append(path.name)
            else:
                said = "empty, left out: the service held the result back (the answer's X-Rejected header says why)"
                print(f"{path}: {said}", file=sys.stderr)
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
    if not rows:
        parser.error("no splat among these files")
    sheet = torch.cat([torch.cat([*row.permute(0, 2, 3, 1)], dim=1) for row in rows])
    Image.fromarray(np.asarray((sheet * 255).round().to(torch.uint8))).save(args.out)
    print(f"{args.out}: {', '.join(made)}, a row each, from eight sides")


if __name__ == "__main__":
    main()
