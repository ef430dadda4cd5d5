"""Rasterising on a CUDA GPU, by gsplat 1.5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from generation.splats.cameras import Cameras
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import gsplat_build

# Pixels. Each pixel of a tile goes through all Gaussians of the tile. Small tiles waste less on small Gaussians, of
# which these scenes have many, and balance the load better when most of them are in the centre of the image.
TILE = 8
# Padding Gaussians: too transparent to be drawn, with a valid quaternion.
PADDING = {"logit_opacities": -100.0, "quats": 1.0}


def rasterize(
    gaussians: Gaussians, cameras: Cameras, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """All views in one call; arguments as the package's `rasterize`, background (C, 3)."""
    return _rasterize(gaussians.tensors(), cameras.viewmats, cameras.Ks, width, height, background)


def rasterize_scenes(
    scenes: Sequence[tuple[Gaussians, Cameras, Tensor]], width: int, height: int
) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """All views of all scenes in one call; arguments as the package's `rasterize_scenes`, backgrounds (C, 3)."""
    fields = [gaussians.tensors() for gaussians, _, _ in scenes]
    rgb, alpha, info = _rasterize(
        {name: _padded([field[name] for field in fields], PADDING.get(name, 0.0)) for name in fields[0]},
        torch.stack([cameras.viewmats for _, cameras, _ in scenes]),
        torch.stack([cameras.Ks for _, cameras, _ in scenes]),
        width,
        height,
        torch.stack([background for _, _, background in scenes]),
    )
    results = []
    for i, (colours, alphas) in enumerate(zip(rgb.unbind(), alpha.unbind(), strict=True)):
        own = (i, slice(None), slice(len(scenes[i][0])))
        more = {"radii": info["radii"][own], "depths": info["depths"][own], "means2d": info["means2d"], "own": own}
        results.append((colours, alphas, more))
    return results


def _padded(tensors: Sequence[Tensor], filler: float) -> Tensor:
    """Pad S tensors (n, ...) to (S, N, ...): one copy in the forward pass, and none in the backward pass.

    `torch.nn.utils.rnn.pad_sequence` writes them one by one, and copies all for each in the backward pass.
    """
    lengths = [len(tensor) for tensor in tensors]
    more = tensors[0].new_full((max(lengths) - min(lengths), *tensors[0].shape[1:]), filler)
    parts = [part for tensor in tensors for part in (tensor, more[: max(lengths) - len(tensor)])]
    return torch.cat(parts).view(len(tensors), max(lengths), *tensors[0].shape[1:])


def _rasterize(
    fields: dict[str, Tensor], viewmats: Tensor, Ks: Tensor, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What the package's `rasterize` returns, each with the dimensions in front that all of the arguments have."""
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise ImportError(
            "rasterising on a GPU needs gsplat, which is not installed: scripts/install.sh gpu"
        ) from error
    gsplat_build.load()
    sh = fields["sh"]
    degree: int | None = math.isqrt(sh.shape[-2]) - 1
    colours = sh
    if degree == 0:
        # The colour is the same from all sides. With harmonics gsplat inverts the cameras, which synchronises.
        degree, colours = None, (0.5 + SH_C0 * sh[..., 0, :]).clamp_min(0.0)
    rgb, alpha, meta = rasterization(
        means=fields["means"],
        quats=fields["quats"],
        scales=fields["log_scales"].exp(),
        opacities=fields["logit_opacities"].sigmoid(),
        colors=colours,
        sh_degree=degree,
        viewmats=viewmats,
        Ks=Ks,
        width=width,
        height=height,
        backgrounds=background,
        near_plane=0.01,
        eps2d=0.3,
        packed=False,
        tile_size=TILE,
        rasterize_mode="classic",
    )
    radii = meta["radii"].amax(dim=-1)  # gsplat gives one for each axis
    return rgb, alpha, {"means2d": meta["means2d"], "radii": radii, "depths": meta["depths"]}
