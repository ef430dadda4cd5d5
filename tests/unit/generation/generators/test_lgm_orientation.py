"""A known object, seen by LGM's views and put back along their rays, looks from everywhere as it does.

The object, its exact renders and their cameras are those of scripts/tiny_pack, which knows nothing of LGM.
"""

from __future__ import annotations

import random

import pytest
import torch

from generation.generators.lgm.network import BIG, plucker_rays, to_gaussians
from generation.splats.cameras import orbit
from generation.splats.rasterize import rasterize
from scripts.tiny_pack import render
from scripts.tiny_pack.captions import ObjectSpec

SIZE, BEHIND = 48, 0.5


def seen(objects: render.Objects, elevation: float, azimuths: torch.Tensor) -> torch.Tensor:
    """Exact renders (V, 4, S, S), premultiplied, from the renderer's own cameras."""
    poses = render.orbit(torch.full_like(azimuths, elevation), azimuths)
    return render.Renderer().render(objects[torch.zeros(len(azimuths), dtype=torch.long)], poses, SIZE, supersample=1)


def put_back(
    objects: render.Objects, moments: torch.Tensor, directions: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """Splats (N, 14) as the network gives them: one where each ray meets the object, in the colour of its pixel."""
    scale = render.RADIUS / BIG.radius
    points = []
    for image, direction, moment in zip(images, directions, moments, strict=True):
        hit = image[3].flatten() > 0.5
        ray = direction[hit]
        from_nearest = torch.linalg.cross(ray, moment[hit])
        depth = torch.full((len(ray), 1), -1.9)  # world units of the renderer, from the point nearest to the origin
        for _ in range(25):
            d, _ = render.distance((from_nearest * scale + depth * ray)[None], objects)
            depth = depth + 0.9 * d[0, :, None]
        place = from_nearest + depth * ray / scale
        colour = (image[:3] / image[3:].clamp_min(1e-3)).flatten(1).T[hit]
        n = len(place)
        points.append(torch.cat([place, torch.full((n, 1), 0.99), torch.full((n, 3), 0.012),
                                 torch.tensor([1.0, 0, 0, 0]).expand(n, 4), colour], 1))  # fmt: skip
    return torch.cat(points)


@pytest.mark.slow
def test_a_known_object_comes_back():
    objects = render.Renderer().frame(render.build([ObjectSpec("chair", "red")], random.Random(0), 0.0))
    images = seen(objects, 0.0, torch.tensor([azimuth for _, azimuth in BIG.views]))
    rays = plucker_rays(BIG.cameras(SIZE).camera_to_world, SIZE, BIG.fovy)
    moments, directions = rays.flatten(2).transpose(1, 2).split(3, -1)
    splats = to_gaussians(put_back(objects, moments, directions, images))
    between = torch.tensor([20.0, 75.0, 160.0, 310.0])
    wanted = seen(objects, 30.0, between)
    wanted = wanted[:, :3] + (1 - wanted[:, 3:]) * BEHIND

    def decibels(elevation: float, azimuths: torch.Tensor) -> float:
        cameras = orbit(elevation, azimuths, BIG.radius, BIG.fovy, SIZE, SIZE)
        rgb, _, _ = rasterize(splats, cameras, SIZE, SIZE, torch.full((3,), BEHIND))
        return float(-10 * (rgb.permute(0, 3, 1, 2) - wanted).square().mean().log10())

    right = decibels(30.0, between)
    assert right > 18
    mistaken = [decibels(-30.0, between), decibels(30.0, -between), decibels(30.0, between + 90)]
    assert max(mistaken) < right - 2, (right, mistaken)
