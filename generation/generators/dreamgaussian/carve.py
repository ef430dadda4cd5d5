"""Initial Gaussians: coloured ones on the surface of the visual hull of a few views.

Laurentini 1994, "The visual hull concept for silhouette-based image understanding".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.splats.cameras import Cameras
from generation.splats.gaussians import SH_C0, Gaussians

GRID = 64
OPACITY = 0.95


def carve(
    images: Tensor, alphas: Tensor, cameras: Cameras, extent: float, count: int, generator: torch.Generator
) -> Gaussians | None:
    """`count` Gaussians on the hull of views `images` (V, 3, S, S) in 0..1 with `alphas` (V, 1, S, S).

    The hull is computed in the cube from -`extent` to `extent` (world units). None when it is empty.
    """
    device = images.device
    ticks = (torch.arange(GRID, device=device) + 0.5) / GRID * 2 - 1
    points = torch.stack(torch.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3) * extent
    places, depths = _project(points, cameras, images.shape[-1])
    inside = _look_up(alphas, places)[..., 0] > 0.5  # (V, G^3)
    occupied = inside.all(0).view(GRID, GRID, GRID)
    if int(occupied.sum()) < 8:
        return None
    solid = occupied.float()[None, None]
    neighbours = F.avg_pool3d(F.pad(solid, (1,) * 6), 3, 1)
    shell = (occupied & (neighbours[0, 0] < 0.999)).flatten()
    outward = -_gradient(F.avg_pool3d(solid, 5, 1, 2)[0, 0]).view(-1, 3)[shell]
    outward = F.normalize(outward, dim=-1)
    surface = points[shell]
    colours = _colours(images, alphas, surface, outward, places[:, shell], depths[:, shell], cameras, 2 * extent / GRID)

    voxel = 2 * extent / GRID
    pick = torch.randint(len(surface), (count,), generator=generator).to(device)
    jitter = (torch.rand(count, 3, generator=generator).to(device) - 0.5) * voxel
    spacing = voxel * (len(surface) / count) ** 0.5
    logit = torch.logit(torch.tensor(OPACITY)).item()
    return Gaussians(
        means=surface[pick] + jitter,
        quats=torch.tensor([1.0, 0, 0, 0], device=device).repeat(count, 1),
        log_scales=torch.full((count, 3), spacing * 0.6, device=device).log(),
        logit_opacities=torch.full((count,), logit, device=device),
        sh=((colours[pick] - 0.5) / SH_C0)[:, None],
    )


def _project(points: Tensor, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Places in -1..1 (V, N, 2) and depths (V, N) of world points (N, 3)."""
    cameras = cameras.to(points.device)
    seen = points @ cameras.viewmats[:, :3, :3].transpose(1, 2) + cameras.viewmats[:, None, :3, 3]
    pixels = seen @ cameras.Ks.transpose(1, 2)
    return pixels[..., :2] / pixels[..., 2:] / size * 2 - 1, seen[..., 2]


def _look_up(maps: Tensor, places: Tensor) -> Tensor:
    """Values (V, N, C) of maps (V, C, S, S) at places (V, N, 2)."""
    return F.grid_sample(maps, places[:, None], align_corners=False)[:, :, 0].transpose(1, 2)


def _gradient(field: Tensor) -> Tensor:
    """Central differences (X, Y, Z, 3) of a scalar field (X, Y, Z)."""
    return torch.stack(torch.gradient(field), -1)


def _colours(images, alphas, surface, outward, places, depths, cameras: Cameras, voxel: float) -> Tensor:
    """Colours (N, 3) of surface points: means over the views that see them, weighted by how directly they face them."""
    size = images.shape[-1]
    cells = ((places * 0.5 + 0.5) * size).long().clamp(0, size - 1)
    flat = cells[..., 1] * size + cells[..., 0]
    nearest = torch.full((len(images), size * size), float("inf"), device=images.device)
    nearest.scatter_reduce_(1, flat, depths, "amin")
    in_front = depths <= nearest.gather(1, flat) + 2 * voxel
    to_camera = F.normalize(cameras.to(surface.device).positions[:, None] - surface, dim=-1)
    cosine = (to_camera * outward).sum(-1)
    # Points that no view sees take colours of the views that face them best. Outlines count little: they are mixed.
    weight = cosine.clamp_min(0) ** 2 * in_front + 1e-3 * (0.5 + 0.5 * cosine) ** 4
    weight = weight[..., None] * (_look_up(alphas, places) ** 4 + 1e-4)
    return (_look_up(images, places) * weight).sum(0) / weight.sum(0).clamp_min(1e-12)
