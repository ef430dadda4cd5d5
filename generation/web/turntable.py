"""A turntable of a splat as mp4."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from numpy.typing import NDArray

from generation.splats.cameras import orbit
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize

SIZE = 512  # pixels
FRAMES = 96
FPS = 24
ELEVATION = 15.0  # degrees
FOVY = 49.1  # degrees
DISTANCE = 2.5 / 1.5  # camera distance, in longest sides of the bounding box, as the validators have it
_BATCH = 8


def render(gaussians: Gaussians, size: int = SIZE, count: int = FRAMES) -> list[NDArray[np.uint8]]:
    """``count`` views (size, size, 3) once around the object, on white."""
    gaussians = gaussians.detach()
    low, high = gaussians.means.amin(dim=0), gaussians.means.amax(dim=0)
    centre = tuple(((low + high) / 2).tolist())
    radius = max(DISTANCE * (high - low).max().item(), 0.1)
    azimuths = torch.arange(count, device=gaussians.means.device) * (360.0 / count)
    cameras = orbit(ELEVATION, azimuths, radius, FOVY, size, size, target=centre)
    white = torch.ones(3, device=gaussians.means.device)
    frames: list[NDArray[np.uint8]] = []
    with torch.no_grad():
        for start in range(0, count, _BATCH):
            rgb, _, _ = rasterize(gaussians, cameras[start : start + _BATCH], size, size, white)
            frames.extend((rgb.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    return frames


def encode(frames: Sequence[NDArray[np.uint8]], fps: int = FPS) -> bytes:
    """H.264 in mp4, playable in browsers. Raises OSError when ffmpeg fails."""
    height, width, _ = frames[0].shape
    with tempfile.TemporaryDirectory(prefix="turntable-") as folder:
        path = Path(folder) / "turntable.mp4"
        writer = imageio_ffmpeg.write_frames(
            str(path), (width, height), fps=fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=2,
            output_params=["-movflags", "+faststart"],
        )  # fmt: skip
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return path.read_bytes()
