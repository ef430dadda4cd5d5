"""Training sets: objects rendered once on the device, kept there as bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .captions import ObjectSpec, caption, sample_spec
from .render import FRONT_ELEVATION, RADIUS, Renderer, build, composite, orbit

# Draws camera elevations, azimuths (degrees) and radii, each (n, views).
CameraSampler = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

# Behind every object that the guidance draws: farther from all colours of objects than any grey, which would swallow
# the steel parts. What draws and what reads its images must agree on it: it stands on the guidance's card.
BACKDROP = (1.0, 0.0, 1.0)

_RAYS_AT_ONCE = 16_000_000  # enough to keep a GPU busy between kernel launches


def front_cameras(n: int, g: torch.Generator):
    """The one view that the text-to-image model draws."""
    return torch.full((n, 1), FRONT_ELEVATION), torch.zeros(n, 1), torch.full((n, 1), RADIUS)


def two_rings(n: int, g: torch.Generator):
    """Eight views: two rings of four, 90 degrees apart, each at an elevation and a start of its own.

    Half of the pairs are set off by 45 degrees, a quarter are at one elevation. Half of the objects are seen from the
    front first, from as high as pictures are taken.
    """
    elevation = (torch.rand(n, 2, generator=g) * 95 - 20).repeat_interleave(4, 1)
    start = (torch.rand(n, 2, generator=g) * 360).repeat_interleave(4, 1)
    front = torch.rand(n, 1, generator=g) < 0.5
    first = torch.arange(8) < 4
    elevation = torch.where(front & first, FRONT_ELEVATION + torch.rand(n, 1, generator=g) * 20 - 10, elevation)
    start = torch.where(front & first, 0.0, start)
    aligned = torch.rand(n, 1, generator=g) < 0.5
    start = torch.where(aligned, start[:, :1] + torch.tensor([0.0] * 4 + [45.0] * 4), start)
    level = torch.rand(n, 1, generator=g) < 0.25
    elevation = torch.where(level, elevation[:, :1], elevation)
    azimuth = start + torch.tensor([0.0, 90, 180, 270] * 2)
    return elevation, azimuth % 360, torch.full((n, 8), RADIUS)


def validator_cameras(n: int, g: torch.Generator, views: int = 6):
    """Views as a validator may take them: around 15 degrees above, from anywhere, nearer and farther."""
    elevation = torch.rand(n, views, generator=g) * 40 - 5
    azimuth = torch.rand(n, views, generator=g) * 360
    radius = RADIUS + torch.rand(n, 1, generator=g).expand(n, views) * 1.0
    return elevation, azimuth, radius


def over_backdrop(rgba: torch.Tensor) -> torch.Tensor:
    """Images (..., 3, S, S) of premultiplied RGBA (..., 4, S, S) in 0..1, in front of BACKDROP."""
    return composite(rgba, torch.tensor(BACKDROP, device=rgba.device).view(3, 1, 1))


@dataclass
class Pool:
    """N objects in V views. `rgba` is premultiplied, (N, V, 4, S, S) uint8."""

    specs: list[ObjectSpec]
    rgba: torch.Tensor
    camera_to_world: torch.Tensor  # (N, V, 4, 4)

    def __len__(self) -> int:
        return len(self.specs)

    def captions(self, ways: int, seed: int = 1) -> list[list[str]]:
        """`ways` captions of every object."""
        rng = random.Random(seed)
        return [[caption(spec, rng) for _ in range(ways)] for spec in self.specs]


def render_pool(
    count: int,
    cameras: CameraSampler,
    size: int,
    device: str,
    seed: int,
    stacks: float = 0.15,
    held_out: bool = False,
    specs: list[ObjectSpec] | None = None,
    supersample: int = 2,
    cache: Path | None = None,
) -> Pool:
    """Draw objects (or take `specs`) and render all views of them at `size` pixels; `cache` keeps them on disk."""
    if cache and cache.exists():
        kept = torch.load(cache, map_location=device, weights_only=False)
        return Pool(**kept)
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    specs = specs or [sample_spec(rng, stacks, held_out) for _ in range(count)]
    renderer = Renderer(device)
    elevation, azimuth, radius = cameras(len(specs), g)
    c2w = orbit(elevation, azimuth, radius).to(device)
    views = c2w.shape[1]
    chunk = min(max(1, _RAYS_AT_ONCE // (supersample * size) ** 2), len(specs))
    rgba = torch.empty(len(specs), views, 4, size, size, dtype=torch.uint8, device=device)
    for start in range(0, len(specs), chunk):
        start = min(start, len(specs) - chunk)  # equal chunks: the compiled kernels keep one shape
        part = slice(start, start + chunk)
        objects = renderer.frame(build(specs[part], rng).to(device))
        for v in range(views):
            rgba[part, v] = (
                (renderer.render(objects, c2w[part, v], size, supersample=supersample) * 255).round().to(torch.uint8)
            )
        if start // chunk % 10 == 0 or start + chunk >= len(specs):
            print(f"rendered {start + chunk} of {len(specs)} objects", flush=True)
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"specs": specs, "rgba": rgba, "camera_to_world": c2w}, cache)
    return Pool(specs, rgba, c2w)
