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

# Pixels. A tile's Gaussians are looked at for each of its pixels, so small ones, of which these scenes have many, waste
# less in small tiles; and where most are in the middle of the picture, a GPU's processors share the work better.
TILE = 8
# Of the Gaussians that fill up smaller scenes: too transparent to be drawn, and no rotation from a length of zero.
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
    """(S, N, ...) of S tensors (n, ...), the shorter ones filled up: one copy there, and none back.

    `torch.nn.utils.rnn.pad_sequence` writes one after the other into place, and copies all on each one's way back.
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
        # The same from all sides: no harmonics, for which gsplat inverts the cameras, and waits for the GPU to have it.
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
