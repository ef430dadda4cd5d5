"""Rasterising on a CUDA GPU, by gsplat 1.5."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from generation.splats.cameras import Cameras
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import kernels


def rasterize(
    gaussians: Gaussians, cameras: Cameras, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """All views in one call; arguments as the package's `rasterize`, background (C, 3)."""
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise ImportError(
            "rasterising on a GPU needs gsplat, which is not installed: pip install -c constraints.txt -e '.[gpu]'"
        ) from error
    kernels.load()
    degree: int | None = math.isqrt(gaussians.sh.shape[1]) - 1
    colours = gaussians.sh
    if degree == 0:
        # The same from all sides: no harmonics, for which gsplat inverts the cameras, and waits for the GPU to have it.
        degree, colours = None, (0.5 + SH_C0 * gaussians.sh[:, 0]).clamp_min(0.0)
    rgb, alpha, meta = rasterization(
        means=gaussians.means,
        quats=gaussians.quats,
        scales=gaussians.log_scales.exp(),
        opacities=gaussians.logit_opacities.sigmoid(),
        colors=colours,
        sh_degree=degree,
        viewmats=cameras.viewmats,
        Ks=cameras.Ks,
        width=width,
        height=height,
        backgrounds=background,
        near_plane=0.01,
        eps2d=0.3,
        packed=False,
        rasterize_mode="classic",
    )
    radii = meta["radii"].amax(dim=-1)  # gsplat gives one for each axis
    return rgb, alpha, {"means2d": meta["means2d"], "radii": radii, "depths": meta["depths"]}
