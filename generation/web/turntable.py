"""A turntable of a splat as mp4."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress

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
QUALITY = 25  # of x264: a lower one is better
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
    """H.264 in mp4, playable in browsers. Raises OSError when ffmpeg fails.

    The file is in memory, so that it needs no room on a disk; ffmpeg seeks in it, which it can not do in a pipe.
    """
    height, width, _ = frames[0].shape
    with os.fdopen(os.memfd_create("turntable"), "rb") as file:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "warning"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
        command += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(QUALITY), "-movflags", "+faststart"]
        command += ["-f", "mp4", f"/proc/self/fd/{file.fileno()}"]
        ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(file.fileno(),))
        with suppress(BrokenPipeError), ffmpeg:  # its exit status tells
            assert ffmpeg.stdin is not None
            for frame in frames:
                ffmpeg.stdin.write(np.ascontiguousarray(frame).data)
        if ffmpeg.returncode != 0:
            raise OSError(f"ffmpeg failed with status {ffmpeg.returncode}")
        return file.read()
