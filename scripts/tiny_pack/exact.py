"""Exact objects in the validators' frame: their views, and splats that show their surface."""

from __future__ import annotations

import random
import time
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


def _looked_at(objects: Objects, c2w: Tensor, pixels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, normals, colours (B, V * pixels^2, 3) and hits of objects from poses (B, V, 4, 4).

    On a GPU all views of an object are one: a kernel's start costs more than its work.
    """
    rays = [_rays(pose, pixels, FOVY).contiguous() for pose in c2w.unbind(1)]
    if c2w.is_cuda:
        origins = torch.cat(
            [pose[:, None, :3, 3].expand_as(ray) for pose, ray in zip(c2w.unbind(1), rays, strict=True)], 1
        )
        groups = [(origins, torch.cat(rays, 1))]
    else:
        groups = [(pose[:, None, :3, 3].contiguous(), ray) for pose, ray in zip(c2w.unbind(1), rays, strict=True)]
    found = []
    for origin, ray in groups:
        points, normal, nearest, hit = (_surface if c2w.is_cuda else _traced)(origin, ray, objects)
        found.append((points, normal, _shade(normal, nearest, ray, objects), hit))
    points, normal, colour, hit = (torch.cat(each, 1) for each in zip(*found, strict=True))
    return points, normal, colour, hit


@torch.no_grad()
def surfaces(objects: Objects, n: int, pixels: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each object points, unit normals and matte colours (N, 3), evenly spread over what `n` pictures see of it."""
    device = objects.scale.device
    height = torch.linspace(-0.95, 0.95, n)
    elevation, azimuth = torch.rad2deg(height.asin()), torch.arange(n) * 137.508 % 360
    matte = replace(objects, material=torch.zeros_like(objects.material))
    poses = [orbit(e.expand(len(objects)), a.expand(len(objects))) for e, a in zip(elevation, azimuth, strict=True)]
    points, normal, colour, hits = _looked_at(matte, torch.stack(poses, 1).to(device), pixels)
    everything = torch.cat([points, normal, colour], 2)
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
    elevation = torch.full_like(azimuth, ELEVATION)
    c2w = orbit(elevation, azimuth, RADIUS).to(objects.scale.device)
    _, _, colour, hit = _looked_at(objects, c2w, pixels)
    shape = (*azimuth.shape, pixels, pixels)
    alpha = hit.float().view(shape)[:, :, None]
    rgb = colour.view(*shape, 3).permute(0, 1, 4, 2, 3) * alpha + 1 - alpha
    b, v = azimuth.shape
    return tuple(smaller(each.flatten(0, 1)).unflatten(0, (b, v)) for each in (rgb, alpha))  # type: ignore[return-value]


def many_exact(wanted: list[Wanted], per_object: int, device: str, seed: int, seconds: float) -> tuple[Tensor, Tensor]:
    """Exact renders, (N, V, ...) as `exact_views`; sizes and places differ a little, as the splats' do.

    As many as so many seconds allow for.
    """
    began = time.monotonic()
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    parts, chunk = [], min(_AT_ONCE, len(wanted))
    for start in range(0, len(wanted) - chunk + 1, chunk):  # equal chunks: the compiled kernels keep one shape
        objects, _ = framed(exact_objects(wanted[start : start + chunk], device, rng))
        n = len(objects)
        factor = (0.85 + 0.2 * torch.rand(n, generator=g)).to(device)
        objects.scale *= factor
        objects.offset = objects.offset * factor[:, None] + (torch.randn(n, 3, generator=g) * 0.03).to(device)
        azimuth = AZIMUTHS[torch.randint(VIEWS, (n, per_object), generator=g)]
        parts.append(tuple(part.cpu() for part in exact_views(objects, azimuth)))
        spent = time.monotonic() - began
        if start // chunk % 5 == 0:
            print(f"exact: {start + n} of {len(wanted)} objects, {spent:.0f} s", flush=True)
        if spent > seconds:
            break
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
