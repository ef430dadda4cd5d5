"""Planted flaws: in splats, where all views agree about them, and in single images, for training.

A flaw's strength is the share of the object's pixels that it changes, over the validators' 16 views.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.splats.cameras import orbit
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import rasterize
from generation.stages.self_check import ELEVATION, FOVY, RADIUS, VIEWS

KINDS = ("blotches", "holes", "floaters", "back")
STRENGTHS = (0.02, 0.08, 0.3)
CHANGED = 0.1  # a pixel counts as changed from this difference in one of its colours on
_MEASURED_AT = 96  # pixels


@torch.no_grad()
def drawn(gaussians: Gaussians, size: int) -> tuple[Tensor, Tensor]:
    """The validators' views of a splat in their frame: colours (16, 3, S, S) in 0..1 on white, alphas (16, 1, S, S)."""
    cameras = orbit(ELEVATION, torch.linspace(0, 360, VIEWS), RADIUS, FOVY, size, size).to(gaussians.means.device)
    rgb, alpha, _ = rasterize(gaussians, cameras, size, size, torch.ones(3))
    return rgb.permute(0, 3, 1, 2).clamp(0, 1), alpha.permute(0, 3, 1, 2)


def shares(clean: tuple[Tensor, Tensor], flawed: Tensor) -> Tensor:
    """Changed pixels (V,) of each view, by the object's pixels in the clean one."""
    changed = ((flawed - clean[0]).abs().amax(1) > CHANGED).sum((1, 2))
    return changed / (clean[1][:, 0] > 0.5).sum((1, 2)).clamp_min(1)


def _colours(gaussians: Gaussians) -> Tensor:
    return 0.5 + SH_C0 * gaussians.sh[:, 0]


def _coloured(gaussians: Gaussians, colours: Tensor) -> Gaussians:
    return replace(gaussians, sh=((colours - 0.5) / SH_C0)[:, None])


def _pick(gaussians: Gaussians, index: Tensor) -> Gaussians:
    return Gaussians(**{name: value[index] for name, value in gaussians.tensors().items()})


def _joined(*parts: Gaussians) -> Gaussians:
    return Gaussians(**{name: torch.cat([p.tensors()[name] for p in parts]) for name in parts[0].tensors()})


def _other_colour(own: Tensor, rng: random.Random) -> Tensor:
    """A colour (3,) that is far from `own`."""
    while True:
        colour = torch.tensor([rng.random() for _ in range(3)])
        if (colour - own.cpu()).abs().amax() > 0.4:
            return colour.to(own.device)


def _uneven(means: Tensor, first: Tensor, second: Tensor, rng: random.Random) -> Tensor:
    """Two colours mixed over space (N, 3), with grain: what a guidance paints where it knows nothing."""
    wave = torch.tensor([[rng.gauss(0, 5) for _ in range(3)] for _ in range(3)], device=means.device)
    mix = torch.sin(means @ wave.T + torch.tensor([rng.uniform(0, 6) for _ in range(3)], device=means.device)).mean(1)
    mix = (0.5 + 0.8 * mix).clamp(0, 1)[:, None]
    grain = torch.randn(len(means), 1, generator=_generator(rng)).to(means.device) * 0.06
    return (first * mix + second * (1 - mix) + grain).clamp(0, 1)


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))


# Each takes a splat and a random number generator and gives a function of the flaw's size (0..1).
_Planter = Callable[[float], Gaussians]


def _centres(gaussians: Gaussians, count: int, rng: random.Random) -> Tensor:
    """Places on the object that the validators' views see, so not below it."""
    solid = (gaussians.logit_opacities >= gaussians.logit_opacities.median().clamp_max(0.0)).nonzero()[:, 0]
    high = solid[gaussians.means[solid, 1] > gaussians.means[solid, 1].quantile(0.15)]
    return gaussians.means[high[torch.randint(len(high), (count,), generator=_generator(rng)).to(high.device)]]


def _blotches(gaussians: Gaussians, count: int, rng: random.Random) -> _Planter:
    centres = _centres(gaussians, count, rng)
    own = _colours(gaussians)
    first = _other_colour(own.mean(0), rng)
    second = first if rng.random() < 0.5 else _other_colour(own.mean(0), rng)
    paint = _uneven(gaussians.means, first, second, rng)
    sizes = torch.tensor([rng.uniform(0.6, 1.0) for _ in range(count)], device=own.device)
    strength = rng.uniform(0.7, 1.0)

    def plant(size: float) -> Gaussians:
        reach = torch.cdist(gaussians.means, centres) / (sizes * 0.8 * size + 1e-6)
        inside = ((1.15 - reach.amin(1)) / 0.3).clamp(0, 1)[:, None] * strength
        return _coloured(gaussians, own + (paint - own) * inside)

    return plant


def _holes(gaussians: Gaussians, count: int, rng: random.Random) -> _Planter:
    """Half of them in the surface alone, half all the way through."""
    centres = _centres(gaussians, count, rng)
    through = rng.random() < 0.5
    azimuth = torch.tensor([rng.uniform(0, math.tau) for _ in range(count)], device=centres.device)
    lines = torch.stack([azimuth.cos(), torch.full_like(azimuth, 0.27), azimuth.sin()], 1)
    lines = F.normalize(lines, dim=1)

    def plant(size: float) -> Gaussians:
        away = gaussians.means[:, None] - centres
        if through:
            away = away - (away * lines).sum(-1, keepdim=True) * lines
        return _pick(gaussians, away.norm(dim=-1).amin(1) > 0.6 * size)

    return plant


def _floaters(gaussians: Gaussians, count: int, rng: random.Random) -> _Planter:
    low, high = gaussians.means.amin(0), gaussians.means.amax(0)
    low, high = low.clamp_max(-0.35), high.clamp_min(0.35)
    generator = _generator(rng)
    places: list[Tensor] = []
    some = gaussians.means[torch.randperm(len(gaussians), generator=generator)[:2000].to(low.device)]
    while len(places) < count:
        place = low + (high - low) * torch.rand(3, generator=generator).to(low.device)
        if (some - place).norm(dim=1).amin() > 0.1 or rng.random() < 0.02:
            places.append(place)
    own = _colours(gaussians)
    n = 60
    clouds = torch.randn(count, n, 3, generator=generator).to(low.device)
    colours = torch.stack([
        own[rng.randrange(len(own))] if rng.random() < 0.5 else _other_colour(torch.ones(3), rng).to(low.device)
        for _ in range(count)
    ])  # fmt: skip
    sizes = torch.tensor([rng.uniform(0.5, 1.0) for _ in range(count)], device=low.device)
    opacity = rng.uniform(0.3, 0.95)

    def plant(size: float) -> Gaussians:
        spread = sizes * 0.3 * size + 1e-4
        means = torch.stack(places)[:, None] + clouds * spread[:, None, None]
        cloud = Gaussians(
            means=means.reshape(-1, 3),
            quats=F.pad(torch.ones(count * n, 1, device=low.device), (0, 3)),
            log_scales=(spread * 0.5).log().repeat_interleave(n)[:, None].expand(-1, 3).contiguous(),
            logit_opacities=torch.full((count * n,), math.log(opacity / (1 - opacity)), device=low.device),
            sh=((colours - 0.5) / SH_C0).repeat_interleave(n, 0)[:, None].clone(),
        )
        return _joined(gaussians, cloud)

    return plant


def _back(gaussians: Gaussians, partner: Gaussians | None, rng: random.Random) -> _Planter:
    """The half away from the front painted with what is not there, or taken from another object."""
    angle = math.radians(rng.uniform(-40, 40))
    front = torch.tensor([math.sin(angle), 0.0, math.cos(angle)], device=gaussians.means.device)
    own = _colours(gaussians)
    paint = _uneven(gaussians.means, _other_colour(own.mean(0), rng), _other_colour(own.mean(0), rng), rng)
    nearest = gaussians.means @ front
    low, high = float(nearest.quantile(0.002)), float(nearest.amax())

    def plant(size: float) -> Gaussians:
        limit = low + (high - low) * size
        behind = nearest < limit
        if partner is None:
            return _coloured(gaussians, torch.where(behind[:, None], paint, own))
        return _joined(_pick(gaussians, ~behind), _pick(partner, partner.means @ front < limit))

    return plant


def _planter(kind: str, gaussians: Gaussians, count: int, rng: random.Random, partner: Gaussians | None) -> _Planter:
    if kind == "blotches":
        return _blotches(gaussians, count, rng)
    if kind == "holes":
        return _holes(gaussians, count, rng)
    if kind == "floaters":
        return _floaters(gaussians, count + 1, rng)
    return _back(gaussians, partner if rng.random() < 0.5 else None, rng)


def plant(
    gaussians: Gaussians, kind: str, strength: float, rng: random.Random, partner: Gaussians | None = None
) -> tuple[Gaussians, Tensor] | None:
    """The splat (in the validators' frame) with a flaw of a strength, and the shares (16,) that it changes.

    `partner`: a splat whose back may be taken for a wrong one. None when no size of the flaw came near the strength.
    """
    count = {0.02: 1, 0.08: 2}.get(strength, 6)
    clean = drawn(gaussians, _MEASURED_AT)
    for _ in range(3):
        planter = _planter(kind, gaussians, count, rng, partner)
        low, high = 0.0, 1.0
        for _ in range(7):
            size = (low + high) / 2
            flawed = planter(size)
            if len(flawed) < 100:
                high = size
                continue
            changed = shares(clean, drawn(flawed, _MEASURED_AT)[0])
            share = float(changed.mean())
            if 0.8 * strength <= share <= 1.25 * strength:
                return flawed, changed
            low, high = (size, high) if share < strength else (low, size)
    return None


def any_flaw(gaussians: Gaussians, rng: random.Random, partner: Gaussians | None = None) -> tuple[Gaussians, str]:
    """The splat with a flaw of some kind and size, small ones most often, and the kind."""
    kind = rng.choice(KINDS)
    planter = _planter(kind, gaussians, rng.choice((1, 1, 2, 6)), rng, partner)
    return planter(rng.random() if kind == "back" else math.exp(rng.uniform(math.log(0.06), 0.0))), kind


def degraded(gaussians: Gaussians, rng: random.Random) -> Gaussians:
    """The splat worsened all over, in one or two ways: Gaussians moved, blown up, thinned out, faint, off in colour."""
    ways = rng.sample(("moved", "large", "thin", "faint", "grain", "patches", "flat"), rng.choice((1, 1, 2)))
    n, device = len(gaussians), gaussians.means.device
    generator = _generator(rng)

    def noise(width: int) -> Tensor:
        return torch.randn(n, width, generator=generator).to(device)

    def amount(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    g = gaussians
    if "moved" in ways:
        g = replace(g, means=g.means + noise(3) * amount(0.003, 0.05))
    if "large" in ways:
        g = replace(g, log_scales=g.log_scales.amax(1, keepdim=True).expand(-1, 3) + amount(0.1, 1.6))
    if "faint" in ways:
        g = replace(g, logit_opacities=g.logit_opacities - amount(1.0, 7.0))
    if "grain" in ways:
        g = _coloured(g, (_colours(g) + noise(3) * amount(0.03, 0.4)).clamp(0, 1))
    if "patches" in ways:
        own = _colours(g)
        paint = _uneven(g.means, _other_colour(own.mean(0), rng), _other_colour(own.mean(0), rng), rng)
        g = _coloured(g, own + (paint - own) * amount(0.05, 0.6))
    if "flat" in ways:
        stretch = torch.tensor([amount(0.7, 1.0) for _ in range(3)], device=device)
        g = replace(g, means=g.means * stretch + 0.05 * torch.sin(g.means.roll(1, 1) * amount(2, 20)) * amount(0.1, 1))
    if "thin" in ways:
        g = _pick(g, torch.rand(n, generator=generator).to(device) > rng.uniform(0.2, 0.95))
    return g


def in_images(rgb: Tensor, alpha: Tensor, others: Tensor, others_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S) with a flaw each, and the share (N,) of the object's pixels that it changes.

    `others`: images of other objects, whose parts may be taken. Everything is drawn at random, strengths evenly in
    their logarithms from 1 to 50 % of the pixels.
    """
    n, _, size, _ = rgb.shape
    device = rgb.device
    solid = alpha > 0.5
    count = solid.sum((1, 2, 3)).clamp_min(1).float()

    def number(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, device=device)

    # A field whose highest places become the flaw: a blob, several, or one side of a line; rough at its edge.
    ticks = torch.linspace(-1, 1, size, device=device)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")

    def place(weights: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.multinomial(weights.flatten(1) + 1e-9, 1)
        return ticks[at % size].view(n, 1, 1), ticks[at // size].view(n, 1, 1)

    kind = torch.randint(5, (n,), device=device)  # blotch, grain, hole, floater, wrong part
    outside = (F.max_pool2d(alpha, 9, 1, 4) < 0.5) & ((x.abs() < 0.7) & (y.abs() < 0.75))
    weights = torch.where((kind == 3).view(n, 1, 1), outside[:, 0].float(), solid[:, 0].float())
    field = torch.full((n, size, size), -9.0, device=device)
    many = torch.rand(n, 1, 1, device=device)
    for extra in (1.1, 0.35, 0.2):  # one, two or three blobs
        cx, cy = place(weights)
        wide = 0.5 + torch.rand(n, 1, 1, device=device)
        blob = -(((x - cx) / wide) ** 2 + ((y - cy) * wide) ** 2).sqrt()
        field = torch.where(many < extra, torch.maximum(field, blob), field)
    angle = torch.rand(n, 1, 1, device=device) * math.tau
    line = x * angle.cos() + y * angle.sin()
    field = torch.where((kind == 4).view(n, 1, 1), line, field)
    rough = F.interpolate(torch.randn(n, 1, 12, 12, device=device), size=(size, size), mode="bicubic")[:, 0]
    field = field + rough * 0.08 * torch.rand(n, 1, 1, device=device)
    wanted = torch.exp(torch.rand(n, device=device) * math.log(50.0)) * 0.01
    reachable = torch.where((kind == 3).view(n, 1, 1, 1), outside, solid)[:, 0]
    ranked = torch.where(reachable, field, -99.0).flatten(1).sort(1, descending=True).values
    index = (wanted * count).long().clamp(1, size * size - 1)
    limit = ranked.gather(1, index[:, None]).view(n, 1, 1)
    softness = 0.02 + 0.08 * torch.rand(n, 1, 1, device=device)
    mask = ((field - limit) / softness + 0.5).clamp(0, 1)[:, None]

    base = (rgb * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp_min(1)
    colour = torch.rand(n, 3, 1, 1, device=device)
    near = (colour - base).abs().amax(1, keepdim=True) < 0.3
    colour = torch.where(near, (base + 0.5) % 1.0, colour)
    second = torch.rand(n, 3, 1, 1, device=device)
    coarse = F.interpolate(torch.randn(n, 1, 9, 9, device=device), size=(size, size), mode="bicubic")
    fine = F.interpolate(torch.randn(n, 3, size // 3, size // 3, device=device), size=(size, size), mode="bilinear")
    shade = 1 - 0.3 * (1 - rgb.mean(1, keepdim=True)).clamp(0, 1)
    blotch = (colour + (second - colour) * (coarse * 0.5 * number(0, 1)).clamp(0, 1)) * shade
    grain = (rgb + fine * number(0.15, 0.5)).clamp(0, 1)
    hole = torch.where(number(0, 1) < 0.6, torch.ones_like(rgb), rgb * number(0.2, 0.6))
    floating = torch.where(number(0, 1) < 0.5, base.expand_as(rgb), colour.expand_as(rgb))
    wrong = torch.where(number(0, 1) < 0.5, others, blotch)
    paint = torch.stack([blotch, grain, hole, floating, wrong], 1)[torch.arange(n, device=device), kind]
    strength = number(0.6, 1.0)
    k = kind.view(n, 1, 1, 1)
    on_object = torch.where(k == 3, torch.ones_like(alpha), alpha)
    taken = (k == 4) & (paint == others).flatten(1).all(1).view(n, 1, 1, 1)
    on_object = torch.where(taken, torch.maximum(alpha, others_alpha), on_object)
    mask = mask * on_object * strength
    flawed = (rgb + (paint - rgb) * mask).clamp(0, 1)
    share = ((flawed - rgb).abs().amax(1) > CHANGED).sum((1, 2)) / count
    return flawed, share
