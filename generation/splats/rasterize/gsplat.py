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
# Pairs of a Gaussian and a tile that it touches, in all views of a call. gsplat numbers them with 32 bits: beyond that
# it reads out of bounds, and the process loses its GPU.
MAX_PAIRS = 2**31 - 1
NEAR_PLANE, BLUR, EXTENT = 0.01, 0.3, 3.33  # gsplat's; the last one in standard deviations


def rasterize(
    gaussians: Gaussians, cameras: Cameras, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """All views in one call; arguments as the package's `rasterize`, background (C, 3).

    Without gradients, Gaussians may be anybody's and of any size: then there are as many calls as gsplat needs.
    """
    if not torch.is_grad_enabled() and sum(pairs := _pairs(gaussians, cameras, width, height)) > MAX_PAIRS:
        if len(cameras) == 1:
            raise ValueError(
                f"gaussians are too large: they may cover {pairs[0]:.0f} tiles of {TILE} x {TILE} pixels in a view, "
                f"at most {MAX_PAIRS} are accepted"
            )
        half = len(cameras) // 2
        rgb, alpha, info = rasterize(gaussians, cameras[:half], width, height, background[:half])
        rgb2, alpha2, info2 = rasterize(gaussians, cameras[half:], width, height, background[half:])
        joined = {name: torch.cat([info[name], info2[name]]) for name in info}
        return torch.cat([rgb, rgb2]), torch.cat([alpha, alpha2]), joined
    return _rasterize(gaussians.tensors(), cameras.viewmats, cameras.Ks, width, height, background)


def _pairs(gaussians: Gaussians, cameras: Cameras, width: int, height: int) -> list[float]:
    """At least as many pairs of a Gaussian and a tile as gsplat has in each view."""
    spread = gaussians.log_scales.amax(1).exp()
    wide, high = -(-width // TILE), -(-height // TILE)
    counts = []
    for view, K in zip(cameras.viewmats, cameras.Ks, strict=True):
        depth = gaussians.means @ view[2, :3] + view[2, 3]
        focal = torch.maximum(K[0, 0], K[1, 1])
        slope = max(width, height) / focal  # more than gsplat's limit of x/z and y/z
        deviation = ((spread * focal / depth).square() * (1 + slope.square()) + BLUR).sqrt()
        along = 2 * (EXTENT * deviation + 1) / TILE + 2
        tiles = along.clamp(max=wide) * along.clamp(max=high)
        counts.append(torch.where(depth < NEAR_PLANE, 0.0, tiles.nan_to_num(wide * high)).sum(dtype=torch.float64))
    return torch.stack(counts).tolist()


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
        near_plane=NEAR_PLANE,
        eps2d=BLUR,
        packed=False,
        tile_size=TILE,
        rasterize_mode="classic",
    )
    radii = meta["radii"].amax(dim=-1)  # gsplat gives one for each axis
    return rgb, alpha, {"means2d": meta["means2d"], "radii": radii, "depths": meta["depths"]}
