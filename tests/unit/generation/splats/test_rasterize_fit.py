"""The gradients are good for what they are there for: fitting Gaussians to an object from pictures of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from generation.splats.cameras import Cameras, orbit
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import rasterize

SIZE = 64


def trace(cameras: Cameras) -> Tensor:
    """(C, H, W, 3) pictures on white of a cube in six colours, a blue sphere on it, ray traced and smoothed."""
    fine = 4 * SIZE
    rows, columns = torch.meshgrid(torch.arange(fine) + 0.5, torch.arange(fine) + 0.5, indexing="ij")
    pixels = torch.stack([columns / 4, rows / 4, torch.ones(fine, fine)], dim=-1)
    pictures = []
    for viewmat, K in zip(cameras.viewmats, cameras.Ks, strict=True):
        rotation = viewmat[:3, :3]
        origin = -(rotation.T @ viewmat[:3, 3])
        rays = torch.nn.functional.normalize(pixels @ torch.linalg.inv(K).T @ rotation, dim=-1)

        half, middle = 0.3, torch.tensor([0.0, -0.2, 0.0])
        ends = torch.stack([(side * half + middle - origin) / rays for side in (-1.0, 1.0)])
        near, axis = ends.amin(0).max(dim=-1)
        far = ends.amax(0).amin(dim=-1)
        cube = torch.where((near < far) & (near > 0), near, torch.inf)
        positive = torch.gather(rays, -1, axis[..., None])[..., 0] < 0  # which of the axis' two faces is hit
        palette = torch.tensor(
            [[[0.9, 0.1, 0.1], [0.9, 0.8, 0.1]], [[0.1, 0.7, 0.2], [0.8, 0.3, 0.8]], [[0.2, 0.7, 0.8], [0.9, 0.5, 0.1]]]
        )
        colour = palette[axis, positive.long()]

        to_sphere = torch.tensor([0.0, 0.3, 0.0]) - origin
        along = (rays * to_sphere).sum(-1)
        discriminant = along.square() - to_sphere.square().sum() + 0.2**2
        sphere = torch.where(discriminant > 0, along - discriminant.clamp_min(0).sqrt(), torch.inf)
        colour = torch.where((sphere < cube)[..., None], torch.tensor([0.1, 0.2, 0.8]), colour)
        hit = torch.isfinite(torch.minimum(cube, sphere))
        picture = torch.where(hit[..., None], colour, torch.ones(3))
        pictures.append(picture.reshape(SIZE, 4, SIZE, 4, 3).mean(dim=(1, 3)))
    return torch.stack(pictures)


def psnr(a: Tensor, b: Tensor) -> float:
    return -10.0 * math.log10((a - b).square().mean().item())


def sphere_of_views(n: int, turn: float) -> Cameras:
    """Cameras spread evenly over the sphere."""
    i = torch.arange(n) + 0.5
    return orbit(torch.rad2deg(torch.asin(0.95 * (1 - 2 * i / n))), turn + 137.508 * i, 2.0, 49.1, SIZE, SIZE)


@pytest.mark.slow
def test_fits_a_known_object_seen_from_new_sides():
    views, new_views = sphere_of_views(120, 0.0), sphere_of_views(16, 55.0)
    pictures = trace(views)
    g = torch.Generator().manual_seed(0)
    n = 8000
    gaussians = Gaussians(
        means=torch.rand(n, 3, generator=g) * 1.1 - 0.55,
        quats=torch.randn(n, 4, generator=g),
        log_scales=torch.full((n, 3), math.log(0.02)),
        logit_opacities=torch.full((n,), -2.0),
        sh=torch.zeros(n, 1, 3),
    )
    rates = {"means": 3e-3, "quats": 1e-2, "log_scales": 2e-2, "logit_opacities": 5e-2, "sh": 2e-2 / SH_C0}
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(
        [{"params": [tensor], "lr": rates[name], "name": name} for name, tensor in gaussians.tensors().items()]
    )
    iterations = 600
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.05 ** (1 / iterations))
    for _ in range(iterations):
        batch = torch.randperm(len(views), generator=g)[:5]
        rgb, _, _ = rasterize(gaussians, views[batch], SIZE, SIZE, torch.ones(3))
        optimizer.zero_grad(set_to_none=True)
        (rgb - pictures[batch]).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        rgb, _, _ = rasterize(gaussians, new_views, SIZE, SIZE, torch.ones(3))
    quality = psnr(rgb, trace(new_views))
    assert quality >= 30.0, f"{quality:.1f} dB on unseen views"
