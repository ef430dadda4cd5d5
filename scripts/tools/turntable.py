"""The moving picture of the README: splats side by side that turn once, as an animated WebP.

.venv/bin/python -m scripts.tools.turntable docs/turntable.webp

It asks the service that ./deploy_competitive.sh started for each prompt, and again with another seed where the answer
is held back. ``--splats A.ply B.ply`` shows files in place of that.
"""

from __future__ import annotations

import argparse
import sys
import urllib.parse
import urllib.request
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

PROMPTS = ("an orange mug", "a green chair", "a purple mushroom", "a yellow castle", "a cyan boat")
SERVICE = "http://127.0.0.1:10006"
SEEDS = 4
FRAMES = 36
FRAME_MS = 90
TIMEOUT_S = 600


def splat_of(service: str, prompt: str) -> bytes:
    """The first PLY of a few seeds that the service does not hold back. Raises SystemExit when there is none."""
    for seed in range(1, SEEDS + 1):
        form = urllib.parse.urlencode({"prompt": prompt, "seed": seed}).encode()
        with urllib.request.urlopen(f"{service}/generate/", form, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read()
            print(f"{prompt}, seed {seed}: {answer.headers.get('X-Rejected') or answer.headers.get('X-Score')}")
        if data:
            return data
    sys.exit(f"{prompt}: held back with {SEEDS} seeds")


@torch.no_grad()
def frames(gaussians: Gaussians, size: int) -> Tensor:
    """One turn on white, (FRAMES, size, size, 3) bytes, at the validators' camera."""
    cameras = orbit(ELEVATION, torch.arange(FRAMES) * (360.0 / FRAMES), RADIUS, FOVY, size, size)
    rgb, _, _ = rasterize(fit_to_frame(gaussians), cameras, size, size, torch.ones(3))
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a .webp or .gif")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--splats", type=Path, nargs="+", help="PLY files in place of prompts")
    parser.add_argument("--service", default=SERVICE, metavar="URL")
    parser.add_argument("--size", type=int, default=176, help="pixels of each splat")
    args = parser.parse_args()
    data = [path.read_bytes() for path in args.splats] if args.splats else None
    data = data or [splat_of(args.service, prompt) for prompt in args.prompts]
    turns = [frames(ply.read(each), args.size) for each in data]
    pictures = [Image.fromarray(np.asarray(each)) for each in torch.cat(turns, dim=2)]
    pictures[0].save(args.out, save_all=True, append_images=pictures[1:], duration=FRAME_MS, loop=0, quality=70)
    print(f"{args.out}: {len(pictures)} pictures, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
