"""Small pictures of a request in progress."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from generation.splats.cameras import orbit
from generation.splats.frame import ELEVATION, FOVY, RADIUS
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize

SIDE = 128  # pixels
STEPS = 8  # previews of one splat in progress


def of_image(image: Tensor) -> bytes:
    """WEBP of a picture (3, H, W) in 0..1, scaled down to at most SIDE pixels."""
    scale = SIDE / max(image.shape[1:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size=size, mode="area")[0]
    return _webp(image.permute(1, 2, 0))


def of_gaussians(gaussians: Gaussians) -> bytes:
    """WEBP of the front view on white, SIDE x SIDE pixels."""
    with torch.no_grad():
        camera = orbit(ELEVATION, 0.0, RADIUS, FOVY, SIDE, SIDE)
        rgb, _, _ = rasterize(gaussians.detach(), camera, SIDE, SIDE, torch.ones(3, device=gaussians.means.device))
    return _webp(rgb[0])


def _webp(pixels: Tensor) -> bytes:
    out = io.BytesIO()
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    Image.fromarray(np.ascontiguousarray(array)).save(out, "WEBP", quality=75)
    return out.getvalue()
