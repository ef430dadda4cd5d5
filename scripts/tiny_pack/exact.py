"""Exact objects in the validators' frame: their views, and splats that show their surface."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.splats.gaussians import SH_C0, Gaussians
from generation.stages.self_check import ELEVATION, FOVY, RADIUS, VIEWS
from generation.stages.self_check.views import BOX_SIDE

from .captions import ObjectSpec
from .render import Objects, Renderer, _rays, _shade, _surface, _traced, assemble, build, orbit
from .shapes import Primitive

SIZE = 168  # pixels that the quality net sees
AZIMUTHS = torch.linspace(0, 360, VIEWS)
_VOXEL = 0.013  # world units between the points of an exact splat
_AT_ONCE = 32  # objects that are rendered together


@torch.no_grad()
def surfaces(objects: Objects, n: int, pixels: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each object points, unit normals and matte colours (N, 3), evenly spread over what `n` pictures see of it."""
    device = objects.scale.device
    height = torch.linspace(-0.95, 0.95, n)
    elevation, azimuth = torch.rad2deg(height.asin()), torch.arange(n) * 137.508 % 360
    found = []
    matte = replace(objects, material=torch.zeros_like(objects.material))
    for e, a in zip(elevation, azimuth, strict=True):
        c2w = orbit(e.expand(len(objects)), a.expand(len(objects))).to(device)
        rays = _rays(c2w, pixels, FOVY).contiguous()
        surface = _surface if rays.is_cuda else _traced
        points, normal, nearest, hit = surface(c2w[:, None, :3, 3].contiguous(), rays, objects)
        found.append((torch.cat([points, normal, _shade(normal, nearest, rays, matte)], 2), hit))
    everything, hits = (torch.cat(each, 1) for each in zip(*found, strict=True))
    out = []
    for each, hit in zip(everything, hits, strict=True):
        points, normal, colour = each[hit].split(3, 1)
        _, cell = torch.unique((points / _VOXEL).floor().long(), dim=0, return_inverse=True)
        first = torch.full((int(cell.max()) + 1,), len(points), device=device)
        first = first.scatter_reduce(0, cell, torch.arange(len(points), device=device), "amin")
        out.append((points[first], normal[first], colour[first]))
    return out


def framed(objects: Objects, exactly: bool = False) -> tuple[Objects, list[Gaussians]]:
    """Objects in the validators' frame (of the mean of their surface), and splats that show them.

    The splats are of use where they are made `exactly`, which takes several times as long.
    """
    objects = replace(objects, scale=objects.scale.clone(), offset=objects.offset.clone())
    splats = []
    for i, (points, normal, colour) in enumerate(surfaces(objects, *((26, 80) if exactly else (16, 40)))):
        middle = points.mean(0)
        factor = BOX_SIDE / float((points.amax(0) - points.amin(0)).max())
        objects.offset[i] = (objects.offset[i] - middle) * factor
        objects.scale[i] = objects.scale[i] * factor
        z = normal[:, 2]
        quats = torch.stack([1 + z, -normal[:, 1], normal[:, 0], torch.zeros_like(z)], 1)
        quats = torch.where((z < -0.999)[:, None], quats.new_tensor([0.0, 1.0, 0.0, 0.0]), F.normalize(quats, dim=1))
        thick = torch.tensor([0.7, 0.7, 0.12], device=z.device) * _VOXEL * factor
        splats.append(
            Gaussians(
                means=(points - middle) * factor,
                quats=quats,
                log_scales=thick.log().expand(len(points), 3).contiguous(),
                logit_opacities=torch.full_like(z, 4.0),
                sh=((colour - 0.5) / SH_C0)[:, None],
            )
        )
    return objects, splats


#: what an object is made from: words, or primitives
Wanted = ObjectSpec | list[Primitive]


def exact_objects(wanted: list[Wanted], device: str, rng: random.Random, jitter: float = 0.04) -> Objects:
    """Objects as DreamGaussian's input frames them."""
    parts = [build([w], rng, jitter) if isinstance(w, ObjectSpec) else assemble([w], rng, jitter) for w in wanted]
    return Renderer(device).frame(Objects.cat(parts).to(device))


def smaller(images: Tensor) -> Tensor:
    """At the net's size, as the self-check does it, in bytes."""
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def exact_views(objects: Objects, azimuth: Tensor, pixels: int = 2 * SIZE) -> tuple[Tensor, Tensor]:
    """Bytes (B, V, 3, S, S) on white and (B, V, 1, S, S) alphas, from azimuths (B, V) of the validators' orbit.

    They are rendered at `pixels`.
    """
    renderer = Renderer(objects.scale.device)
    rgb, alpha = [], []
    for a in azimuth.T:
        c2w = orbit(torch.full_like(a, ELEVATION), a, RADIUS).to(objects.scale.device)
        rgba = renderer.render(objects, c2w, pixels, FOVY, supersample=1)
        rgb.append(smaller(rgba[:, :3] + 1 - rgba[:, 3:]))
        alpha.append(smaller(rgba[:, 3:]))
    return torch.stack(rgb, 1), torch.stack(alpha, 1)


def many_exact(wanted: list[Wanted], per_object: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Exact renders, (N, V, ...) as `exact_views`; sizes and places differ a little, as the splats' do."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    parts, chunk = [], min(_AT_ONCE, len(wanted))
    for start in range(0, len(wanted) - chunk + 1, chunk):  # equal chunks: the compiled kernels keep one shape
        objects, _ = framed(exact_objects(wanted[start : start + chunk], device, rng))
        n = len(objects)
        factor = (0.85 + 0.2 * torch.rand(n, generator=g)).to(device)
        objects.scale *= factor
        objects.offset = objects.offset * factor[:, None] + (torch.randn(n, 3, generator=g) * 0.03).to(device)
        azimuth = AZIMUTHS[torch.randint(VIEWS, (n, per_object), generator=g)]
        parts.append(exact_views(objects, azimuth))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
