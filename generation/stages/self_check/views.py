"""A splat as the validators see it: in their frame, from their cameras; and their previews."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from generation.splats import cameras
from generation.splats.frame import BOX_SIDE, ELEVATION, FOVY, RADIUS, VIEW_SIZE
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import rasterize

VIEWS = 16
MAX_LIFT = 16.0  # how far under black a colour is followed
#: which views a preview is made of: the single one, and the grid that duels are judged on
FRONT_VIEW, GRID_VIEWS, GRID_GAP = 1, (1, 5, 9, 13), 5


def fit_to_frame(gaussians: Gaussians) -> Gaussians:
    """The same splat, its points' mean at the origin and the longest side of their bounding box ``BOX_SIDE``.

    So splats are delivered. ``to_validators_frame`` leaves them as they are then. A colour under black becomes black:
    it was optimised as that, and the validators' renderer would take its light away from what is blended with it.
    """
    means = gaussians.means - gaussians.means.mean(0)
    scale = BOX_SIDE / float((means.amax(0) - means.amin(0)).max())
    constant, harmonics = gaussians.sh[:, :1].clamp_min(-0.5 / SH_C0), gaussians.sh[:, 1:]
    return replace(
        gaussians,
        means=means * scale,
        log_scales=gaussians.log_scales + float(np.log(scale)),
        sh=torch.cat([constant, harmonics], dim=1),
    )


def to_validators_frame(gaussians: Gaussians) -> Gaussians:
    """The same splat, as the validators' code brings it into their frame.

    It subtracts one mean over all coordinates where it means one for each axis, and divides opacities by the factor
    that it scales by.
    """
    means = gaussians.means - gaussians.means.mean()
    scale = BOX_SIDE / float((gaussians.means.amax(0) - gaussians.means.amin(0)).max())
    opacities = (gaussians.logit_opacities.sigmoid() * (1 / scale)).clamp(0, 1)
    return replace(
        gaussians,
        means=means * scale,
        log_scales=gaussians.log_scales + float(np.log(scale)),
        logit_opacities=opacities.logit(),
    )


@torch.no_grad()
def render_views(gaussians: Gaussians) -> Tensor:
    """The validators' views (16, 3, 518, 518) of a splat in their frame, in 0..1, on white, cut down to 8 bits.

    The last azimuth is a full turn, so its view is the first one's. Only the constant colour is drawn, and one that is
    darker than black takes light away from what is blended with it.
    """
    sh = gaussians.sh[:, :1]
    # Our rasteriser clamps colours at 0. So an amount is added to all colours and to the background, and subtracted
    # from the pixels, whose weights sum to 1. It is a power of two, so that it costs no precision.
    darkest = float((-0.5 - SH_C0 * sh).amax())
    lift = min(MAX_LIFT, 2.0 ** math.ceil(math.log2(darkest))) if darkest > 0 else 0.0
    azimuths = torch.linspace(0, 360, VIEWS, dtype=torch.float64)[:-1]
    orbit = cameras.orbit(ELEVATION, azimuths, RADIUS, FOVY, VIEW_SIZE, VIEW_SIZE)
    rgb, _, _ = rasterize(
        replace(gaussians, sh=sh + lift / SH_C0),
        orbit.to(gaussians.means.device),
        VIEW_SIZE,
        VIEW_SIZE,
        torch.full((3,), 1.0 + lift),
    )
    views = ((rgb - lift).permute(0, 3, 1, 2).clamp(0, 1) * 255).floor() / 255
    return torch.cat([views, views[:1]])


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) float32 in 0..1; what is transparent in it becomes white."""
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def preview(views: Tensor) -> bytes:
    """The view that validators show, as PNG."""
    return _png(_to_picture(views[FRONT_VIEW]))


def grid_preview(views: Tensor) -> bytes:
    """Four views on black, two by two, which duels are judged on, as PNG."""
    size = views.shape[-1]
    side = 2 * size + GRID_GAP
    grid = Image.new("RGB", (side, side))
    for i, view in enumerate(GRID_VIEWS):
        grid.paste(_to_picture(views[view]), (i % 2 * (size + GRID_GAP), i // 2 * (size + GRID_GAP)))
    return _png(grid)


def _to_picture(view: Tensor) -> Image.Image:
    return Image.fromarray((view * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
