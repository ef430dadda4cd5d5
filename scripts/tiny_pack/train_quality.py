"""The quality net: how good a splat looks, as the validators' own net says it, from one view and without the prompt.

It learns from exact renders, from the pack's real results (`results.py` makes them), labelled by their distance to the
exact render of what was asked for, and from planted flaws (`flaws.py`). Its test pairs are of shapes that it never saw.

    python -m scripts.tiny_pack.results --work FOLDER && python -m scripts.tiny_pack.train_quality --work FOLDER
"""

from __future__ import annotations

import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.utils import make_grid, save_image
from transformers import Dinov2Config

from generation.splats.gaussians import SH_C0, Gaussians
from generation.stages.self_check import ELEVATION, FOVY, RADIUS, VIEWS, fit_to_frame
from generation.stages.self_check.quality import WEIGHTS, QualityNet
from generation.stages.self_check.views import BOX_SIDE

from . import flaws
from .captions import ObjectSpec
from .render import Objects, Renderer, _rays, _shade, _surface, _traced, build, orbit
from .results import OWN, SIZE, UNSEEN, planted, smaller, test_specs, training_spec, views
from .shapes import COLOURS
from .training import arguments, fit, forget_paths, write_card

MARGIN = 0.2  # results whose distances differ by less of the larger one are a tie
# What a view should be worth by the share of the object's pixels that a flaw changes: half at HALF_WORTH.
HALF_WORTH, STEEPNESS = 0.06, 1.2
EXACT = 0.97
_VOXEL = 0.013  # world units between the points of an exact splat


def config() -> Dinov2Config:
    return Dinov2Config(
        image_size=SIZE, patch_size=14, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=4
    )


def fresh_net() -> QualityNet:
    """A net whose patch embedding starts with the lowest cosines of brightness and two colour differences.

    From random filters the same takes several times the steps.
    """
    net = QualityNet(config())
    projection = net.backbone.embeddings.patch_embeddings.projection
    width, side = projection.out_channels, projection.kernel_size[0]
    ticks = (torch.arange(side) + 0.5) / side * math.pi
    waves = sorted(((u, v) for u in range(side) for v in range(side)), key=lambda f: f[0] ** 2 + f[1] ** 2)
    mixes = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]]), dim=1)
    counts = (width - 2 * (width // 5), width // 5, width // 5)
    filters = []
    for mix, count in zip(mixes, counts, strict=True):
        for u, v in waves[:count]:
            wave = torch.outer((ticks * u).cos(), (ticks * v).cos())
            filters.append(mix.view(3, 1, 1) * (wave / wave.norm().clamp_min(1e-12)) * (0.1 + 0.08 * (u + v)))
    with torch.no_grad():
        projection.weight.copy_(torch.stack(filters))
        projection.bias.zero_()
    return net


# Exact objects, in the validators' frame.


@torch.no_grad()
def surfaces(objects: Objects, n: int, pixels: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each object points, unit normals and matte colours (N, 3), evenly spread over what `n` pictures see of it."""
    device = objects.scale.device
    height = torch.linspace(-0.95, 0.95, n)
    elevation, azimuth = torch.rad2deg(height.asin()), torch.arange(n) * 137.508 % 360
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(len(objects))]
    matte = replace(objects, material=torch.zeros_like(objects.material))
    for e, a in zip(elevation, azimuth, strict=True):
        c2w = orbit(e.expand(len(objects)), a.expand(len(objects))).to(device)
        rays = _rays(c2w, pixels, FOVY).contiguous()
        surface = _surface if rays.is_cuda else _traced
        points, normal, nearest, hit = surface(c2w[:, None, :3, 3].contiguous(), rays, objects)
        colour = _shade(normal, nearest, rays, matte)
        for i, own in enumerate(hit):
            found[i].append((points[i][own], normal[i][own], colour[i][own]))
    out = []
    for parts in found:
        points, normal, colour = (torch.cat(each) for each in zip(*parts, strict=True))
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


def exact_objects(specs: list[ObjectSpec], device: str, rng: random.Random, jitter: float = 0.04) -> Objects:
    return Renderer(device).frame(build(specs, rng, jitter).to(device))


@torch.no_grad()
def exact_views(objects: Objects, azimuth: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (B, V, 3, S, S) on white and (B, V, 1, S, S) alphas, from azimuths (B, V) of the validators' orbit."""
    renderer = Renderer(objects.scale.device)
    rgb, alpha = [], []
    for a in azimuth.T:
        c2w = orbit(torch.full_like(a, ELEVATION), a, RADIUS).to(objects.scale.device)
        rgba = renderer.render(objects, c2w, 2 * SIZE, FOVY, supersample=1)
        rgb.append(smaller(rgba[:, :3] + 1 - rgba[:, 3:]))
        alpha.append(smaller(rgba[:, 3:]))
    return torch.stack(rgb, 1), torch.stack(alpha, 1)


def _in_chunks(specs: list[ObjectSpec], size: int) -> list[list[ObjectSpec]]:
    return [specs[i : i + size] for i in range(0, len(specs), size)]


AZIMUTHS = torch.linspace(0, 360, VIEWS)


def many_exact(count: int, per_object: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Exact renders of training objects, (N, V, ...) as `exact_views`; a fifth of them in colours of any kind.

    Sizes and places differ a little, as the splats' do.
    """
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    parts = []
    palette = torch.tensor(list(COLOURS.values()))
    for specs in _in_chunks([training_spec(rng) for _ in range(count)], 64):
        objects, _ = framed(exact_objects(specs, device, rng))
        n = len(specs)
        factor = (0.88 + 0.14 * torch.rand(n, generator=g)).to(device)
        objects.scale *= factor
        objects.offset = objects.offset * factor[:, None] + (torch.randn(n, 3, generator=g) * 0.03).to(device)
        motley = (torch.rand(n, generator=g) < 0.2).to(device)
        colours = palette[torch.randint(len(palette), objects.colour.shape[:2], generator=g)].to(device)
        objects.colour = torch.where(motley[:, None, None], colours, objects.colour)
        azimuth = AZIMUTHS[torch.randint(VIEWS, (n, per_object), generator=g)]
        parts.append(exact_views(objects, azimuth))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


# How far a result is from what was asked for.


def _blur(x: Tensor, sigma: float) -> Tensor:
    reach = int(3 * sigma + 0.5)
    ticks = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    window = torch.exp(-(ticks**2) / (2 * sigma**2))
    window = (window / window.sum())[None, None, None].expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, reach, reach), mode="replicate"), window, groups=x.shape[1])
    return F.conv2d(x, window.transpose(2, 3), groups=x.shape[1])


TINT = 0.08  # of each colour, that a result may differ by all over
SCALES = (0.88, 0.92, 0.96, 1.0, 1.04, 1.08, 1.12)


def aligned(exact: Tensor, seen: Tensor, reach: int = 7) -> Tensor:
    """RGBA `exact` (V, 4, S, S), moved and scaled to lie on `seen`: one scale, and a shift for each view."""
    v, _, size, _ = exact.shape
    k = len(SCALES)
    theta = torch.zeros(k, 2, 3, device=exact.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / torch.tensor(SCALES, device=exact.device)
    grid = F.affine_grid(theta.repeat_interleave(v, 0), [k * v, 4, size, size], align_corners=False)
    sized = F.grid_sample(exact.repeat(k, 1, 1, 1), grid, align_corners=False)
    product = (torch.fft.rfft2(seen).repeat(k, 1, 1, 1) * torch.fft.rfft2(sized).conj()).sum(1)
    ticks = torch.arange(size, device=exact.device)
    near = torch.minimum(ticks, size - ticks) <= reach
    likeness = torch.fft.irfft2(product, s=(size, size)).masked_fill(~(near[:, None] & near), -1e9)
    at = likeness.flatten(1).argmax(1)
    rows, columns = (ticks - (at // size)[:, None]) % size, (ticks - (at % size)[:, None]) % size
    view = torch.arange(k * v, device=exact.device)
    moved = sized.permute(0, 2, 3, 1)[view[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    moved = moved.unflatten(0, (k, v))
    return moved[(moved - seen).abs().mean((1, 2, 3, 4)).argmin()]


def distance(seen: Tensor, exact: Tensor) -> Tensor:
    """(V,) of views RGBA (V, 4, S, S), colours premultiplied, 0..1: 0 for the exact render, about 1 for something else.

    Small differences of place, size and tint (one for all views) count for nothing. What is left of structure
    (1 - SSIM), colour at two coarser scales, and outline (1 - intersection over union) is added up.
    """
    exact = aligned(exact, seen)
    union = torch.maximum(seen[:, 3:], exact[:, 3:])
    where = (F.max_pool2d(union, 5, 1, 2) > 0.3).float()
    area = where.sum((1, 2, 3)).clamp_min(1)

    def over(x: Tensor) -> Tensor:
        return (x.mean(1, keepdim=True) * where).sum((1, 2, 3)) / area

    inner = torch.minimum(seen[:, 3:], exact[:, 3:])
    tint = ((seen[:, :3] - exact[:, :3]) * inner).sum((0, 2, 3)) / inner.sum().clamp_min(1)
    tint = tint.clamp(-TINT, TINT)[None, :, None, None]
    x, y = seen[:, :3] + 1 - seen[:, 3:], exact[:, :3] + tint * exact[:, 3:] + 1 - exact[:, 3:]
    mx, my = _blur(x, 1.5), _blur(y, 1.5)
    vx, vy, cov = _blur(x * x, 1.5) - mx**2, _blur(y * y, 1.5) - my**2, _blur(x * y, 1.5) - mx * my
    ssim = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    colour = over((_blur(x, 2) - _blur(y, 2)).abs()) + over((_blur(x, 5) - _blur(y, 5)).abs())
    outline = 1 - inner.sum((1, 2, 3)) / union.sum((1, 2, 3)).clamp_min(1)
    return 0.5 * over(1 - ssim) + 0.7 * colour + 0.6 * outline


def rgba(record: dict[str, Any], device: str) -> Tensor:
    rgb, alpha = (record[k].to(device).float() / 255 for k in ("views", "alpha"))
    return torch.cat([rgb - (1 - alpha), alpha], 1).clamp(0, 1)


# Everything that has views: exact splats, results, and both with flaws.


def exact_splats(specs: list[ObjectSpec], split: str, device: str, rng: random.Random) -> list[dict[str, Any]]:
    """Records as those of `results`: splats of exact objects, and the same with flaws."""
    records: list[dict[str, Any]] = []
    before = None
    kinds = list(flaws.KINDS)
    for part in _in_chunks(specs, 32):
        for spec, splat in zip(part, framed(exact_objects(part, device, rng), True)[1], strict=True):
            about = {"object": f"exact {split} {len(records)}", "split": split, "way": "exact", "iteration": 0}
            rgb, alpha = views(fit_to_frame(splat))
            records.append({**about, "views": rgb.cpu(), "alpha": alpha.cpu(), "flaw": None, "spec": spec})
            rng.shuffle(kinds)
            wanted = [(kind, rng.choice(flaws.STRENGTHS)) for kind in (kinds if split == "test" else kinds[:2])]
            records += [{**about, "spec": spec, **record} for record in planted(splat, wanted, rng, before)]
            before = splat
    return records


def worth_of_share(share: Tensor) -> Tensor:
    return 1 / (1 + (share / HALF_WORTH) ** STEEPNESS)


def label(records: list[dict[str, Any]], device: str) -> dict[str, float]:
    """Adds to each record its distances (16,), their mean, and what its views should be worth (16,).

    Returns the distances that the scale is tied to: those of the profile's own results that the judge names right.
    """
    exact: dict[Any, Tensor] = {}
    wanted = sorted({str(r["spec"]) for r in records if r["way"] != "exact"})
    specs = {str(r["spec"]): ObjectSpec(**r["spec"]) for r in records if r["way"] != "exact"}
    for names in (wanted[i : i + 64] for i in range(0, len(wanted), 64)):
        objects, _ = framed(exact_objects([specs[n] for n in names], device, random.Random(0), jitter=0.0))
        rgb, alpha = exact_views(objects, AZIMUTHS.expand(len(names), VIEWS))
        for i, name in enumerate(names):
            exact[name] = rgba({"views": rgb[i], "alpha": alpha[i]}, device)
    for record in records:
        if record["flaw"] is None:
            far = torch.zeros(VIEWS)
            if record["way"] != "exact":
                far = distance(rgba(record, device), exact[str(record["spec"])]).cpu()
            record["distances"], record["distance"] = far, float(far.mean())
    right = torch.tensor([r["distance"] for r in records if own_and_right(r)] or [0.3, 0.6])
    scale = {"low": float(right.quantile(0.05)), "high": float(right.quantile(0.95))}
    base: dict[Any, Tensor] = {}
    for record in records:
        key = (record["object"], record["way"], record["iteration"])
        if record["flaw"] is None:
            far = 0.5 * record["distances"] + 0.5 * record["distance"]
            base[key] = record["worth"] = worth_of_distance(far, scale)
            if own_and_right(record):
                record["worth"] = base[key] = base[key].clamp_min(0.76)
    for record in records:
        if record["flaw"] is not None:
            key = (record["object"], record["way"], record["iteration"])
            record["worth"] = base[key] * worth_of_share(record["flaw"]["shares"])
    return scale


def worth_of_distance(far: Tensor, scale: dict[str, float]) -> Tensor:
    """EXACT at 0, 0.92 at the scale's low end, 0.8 at its high end, and soon much less beyond that."""
    low, high = scale["low"], scale["high"]
    xs = [0.0, low, high, 1.5 * high, 2.2 * high, 4.0 * high]
    ys = [EXACT, 0.92, 0.8, 0.5, 0.15, 0.05]
    out = torch.full_like(far, ys[-1])
    for x0, x1, y0, y1 in reversed(list(zip(xs, xs[1:], ys, ys[1:], strict=False))):
        out = torch.where(far <= x1, y0 + (y1 - y0) * ((far - x0) / (x1 - x0)).clamp(0, 1), out)
    return out


def ordered(records: Sequence[dict[str, Any]], a: int, b: int, margin: float) -> tuple[int, int] | None:
    """The two with the better first; None where their distances are a tie."""
    better, worse = sorted((a, b), key=lambda i: records[i]["distance"])
    near, far = records[better]["distance"], records[worse]["distance"]
    return (better, worse) if far - near > margin * far else None


def any_pairs(
    records: Sequence[dict[str, Any]], margin: float, count: int, rng: random.Random
) -> list[tuple[int, int]]:
    """As `real_pairs`, of results of different objects, drawn at random."""
    results = [i for i, r in enumerate(records) if r["flaw"] is None and r["way"] != "exact"]
    pairs: list[tuple[int, int]] = []
    for _ in range(20 * count):
        a, b = rng.sample(results, 2)
        pair = ordered(records, a, b, margin)
        if pair and records[a]["object"] != records[b]["object"] and len(pairs) < count:
            pairs.append(pair)
    return pairs


def real_pairs(records: Sequence[dict[str, Any]], margin: float) -> list[tuple[int, int]]:
    """Indices (better, worse) of results of one object whose distances are no tie."""
    groups = defaultdict(list)
    for i, record in enumerate(records):
        if record["flaw"] is None and record["way"] != "exact":
            groups[record["object"]].append(i)
    pairs = []
    for group in groups.values():
        for k, a in enumerate(group):
            pairs += [pair for b in group[k + 1 :] if (pair := ordered(records, a, b, margin))]
    return pairs


def flaw_pairs(records: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    clean = {(r["object"], r["way"], r["iteration"]): i for i, r in enumerate(records) if r["flaw"] is None}
    return [(clean[r["object"], r["way"], r["iteration"]], i) for i, r in enumerate(records) if r["flaw"] is not None]


# Training.


class Sampler:
    """Draws batches of pairs: views (2, P, 4, 3, S, S) in 0..1, their worth (2, P, 4); the first should be better."""

    def __init__(self, records: list[dict[str, Any]], exact: tuple[Tensor, Tensor], device: str) -> None:
        self.device = device
        self.views = torch.stack([r["views"] for r in records]).to(device)
        self.alpha = torch.stack([r["alpha"] for r in records]).to(device)
        self.worth = torch.stack([r["worth"] for r in records]).to(device)
        self.exact, self.exact_alpha = exact
        self.real = torch.tensor(real_pairs(records, 0.08), device=device)
        self.flawed = torch.tensor(flaw_pairs(records), device=device)
        self.distance = torch.tensor([r.get("distance", 0.0) for r in records], device=device)
        self.clean = torch.tensor([i for i, r in enumerate(records) if r["flaw"] is None], device=device)
        print(f"quality: {len(self.real)} pairs of results, {len(self.flawed)} with flaws", flush=True)

    def _any(self, count: int) -> Tensor:
        """Pairs (P, 2) of clean records of any objects, the nearer to its exact render first."""
        pair = self.clean[torch.randint(len(self.clean), (count, 2), device=self.device)]
        return pair.gather(1, self.distance[pair].argsort(1))

    def _of(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        pair, count = pairs.T, len(pairs)
        v = torch.randint(VIEWS, (1, count, 4), device=self.device).expand(2, -1, -1)
        return self.views[pair[..., None], v], self.worth[pair[..., None], v]

    def _clean(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Exact renders and results, half of each: views and alphas (P, 4, ...), bytes, and worth."""
        half = count // 2
        i = torch.randint(len(self.exact), (count - half,), device=self.device)[:, None]
        v = torch.randint(self.exact.shape[1], (count - half, 4), device=self.device)
        k = self.clean[torch.randint(len(self.clean), (half,), device=self.device)][:, None]
        w = torch.randint(VIEWS, (half, 4), device=self.device)
        exact_worth = torch.full((count - half, 4), EXACT, device=self.device)
        return (
            torch.cat([self.exact[i, v], self.views[k, w]]),
            torch.cat([self.exact_alpha[i, v], self.alpha[k, w]]),
            torch.cat([exact_worth, self.worth[k, w]]),
        )

    def _planted(self, count: int) -> tuple[Tensor, Tensor]:
        """Clean views, and the same with a flaw in each image."""
        rgb, alpha, worth = self._clean(count)
        rgb, alpha = rgb.flatten(0, 1).float() / 255, alpha.flatten(0, 1).float() / 255
        order = torch.randperm(len(rgb), device=self.device)
        flawed, share = flaws.in_images(rgb, alpha, rgb[order], alpha[order])
        flawed_worth = worth * worth_of_share(share).view_as(worth)
        images = torch.stack([rgb, flawed]).unflatten(1, (count, 4))
        return images, torch.stack([worth, flawed_worth])

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        half, quarter = count // 5, count // 4
        one = self.real[torch.randint(len(self.real), (half,), device=self.device)]
        real, worth = self._of(torch.cat([one, self._any(half)]))
        flawed, flawed_worth = self._of(self.flawed[torch.randint(len(self.flawed), (quarter,), device=self.device)])
        images, image_worth = self._planted(count - len(worth[0]) - len(flawed_worth[0]))
        x = torch.cat([real.float() / 255, flawed.float() / 255, images], 1)
        return self._moved(x), torch.cat([worth, flawed_worth, image_worth], 1)

    def _moved(self, x: Tensor, reach: int = 5) -> Tensor:
        """Each pair shifted by whole pixels, both of it alike."""
        shifts = torch.randint(-reach, reach + 1, (x.shape[1], 2)).tolist()
        return torch.stack([torch.roll(x[:, i], tuple(s), (-2, -1)) for i, s in enumerate(shifts)], 1)


def objective(net: Any, x: Tensor, worth: Tensor) -> Tensor:
    """Soft labels for each view, and the order of each pair's means."""
    logits = net(x.flatten(0, 2)).float().view_as(worth)
    label_loss = F.binary_cross_entropy_with_logits(logits, worth)
    mean = logits.sigmoid().mean(-1)
    gap = (worth[0] - worth[1]).mean(-1)
    order = F.softplus(-(mean[0] - mean[1]) / 0.04) * (gap.abs() > 1e-4)
    # The order in logits, too: where sigmoids are flat it still pulls.
    apart = F.softplus(-2.0 * (logits[0].mean(-1) - logits[1].mean(-1)))
    return label_loss + 0.3 * order.mean() + 0.2 * apart.mean()


@torch.no_grad()
def calibrate(net: Any, records: Sequence[dict[str, Any]], exact: Tensor) -> None:
    """Scale and shift the logit, in the head's own weights, so that on what it was trained with three shares are high:
    exact renders (N, V, 3, S, S) of at least 0.9, the profile's results that the judge names right of at least 0.7,
    and gross flaws of at most 0.4. The order of single views stays as it is.
    """
    groups = (
        ([v for v in exact], 0.9, 1),
        ([r["views"] for r in records if own_and_right(r)], 0.7, 1),
        ([r["views"] for r in records if gross(r)], 0.4, -1),
    )
    logits = [
        (torch.stack([net(v.float() / 255).float() for v in views]), limit, sign) for views, limit, sign in groups
    ]
    best, choice = -1.0, (1.0, 0.0)
    for scale in torch.linspace(0.5, 3.0, 26).tolist():
        for shift in torch.linspace(-3.0, 3.0, 61).tolist():
            kept = [
                float((sign * ((scale * x + shift).sigmoid().mean(1) - limit) >= 0).float().mean())
                for x, limit, sign in logits
            ]
            value = min(kept) + 0.1 * sum(kept) - 0.01 * abs(scale - 1) - 0.005 * abs(shift)
            if value > best:
                best, choice = value, (scale, shift)
    scale, shift = choice
    print(f"quality: logits times {scale:.2f} plus {shift:.2f}", flush=True)
    net.score_head.weight.mul_(scale)
    net.score_head.bias.mul_(scale).add_(shift)


# Measuring.


def own_and_right(record: dict[str, Any]) -> bool:
    """A result of the profile as it is, which the judge names right."""
    return record["flaw"] is None and (record["way"], record["iteration"]) in OWN and record["named"]


def gross(record: dict[str, Any]) -> bool:
    return record["flaw"] is not None and record["flaw"]["strength"] == max(flaws.STRENGTHS)


@torch.no_grad()
def scores(net: Any, images: Tensor) -> Tensor:
    """Mean over the views (N,) of bytes (N, V, 3, S, S)."""
    device = next(net.parameters()).device
    return torch.cat([net(v.to(device).float() / 255).float().sigmoid().mean()[None].cpu() for v in images])


def measure(net: Any, records: list[dict[str, Any]], exact: Tensor, seed: int) -> tuple[dict[str, Any], list]:
    """The card's figures on records of unseen shapes, and the test pairs [(kind, better, worse)] they are from."""
    got = scores(net, torch.stack([r["views"] for r in records])).tolist()
    rng = random.Random(seed)
    planted_pairs = flaw_pairs(records)
    rng.shuffle(planted_pairs)
    same = real_pairs(records, MARGIN)
    rng.shuffle(same)
    same = same[: len(planted_pairs) // 2]
    others = any_pairs(records, MARGIN, len(planted_pairs) - len(same), rng)
    pairs = [("results of one prompt", a, b) for a, b in same] + [("results", a, b) for a, b in others]
    pairs += [(records[b]["flaw"]["kind"], a, b) for a, b in planted_pairs]

    def share(chosen: list[bool]) -> float:
        return round(sum(chosen) / max(len(chosen), 1), 4)

    quality: dict[str, Any] = {
        "pairs": len(pairs),
        "pairs_right": share([got[a] > got[b] for _, a, b in pairs]),
        "pairs_of_results": len(same) + len(others),
        "results_right": share([got[a] > got[b] for k, a, b in pairs if k.startswith("results")]),
        "pairs_of_results_of_one_prompt": len(same),
        "results_of_one_prompt_right": share([got[a] > got[b] for a, b in same]),
    }
    for kind in flaws.KINDS:
        quality[f"{kind}_right"] = share([got[a] > got[b] for k, a, b in pairs if k == kind])
    for strength in flaws.STRENGTHS:
        right = [
            got[a] > got[b] for k, a, b in pairs if k in flaws.KINDS and records[b]["flaw"]["strength"] == strength
        ]
        quality[f"flaws_of_{strength:g}_right"] = share(right)
    renders = scores(net, exact)
    right = [s for r, s in zip(records, got, strict=True) if own_and_right(r)]
    worst = [s for r, s in zip(records, got, strict=True) if gross(r)]
    quality |= {
        "exact_mean": round(float(renders.mean()), 4),
        "exact_at_least_0.9": share([s >= 0.9 for s in renders.tolist()]),
        "judged_right": len(right),
        "judged_right_median": round(float(torch.tensor(right or [0.0]).median()), 4),
        "judged_right_at_least_0.7": share([s >= 0.7 for s in right]),
        "gross_flaws": len(worst),
        "gross_flaws_median": round(float(torch.tensor(worst or [0.0]).median()), 4),
        "gross_flaws_at_most_0.4": share([s <= 0.4 for s in worst]),
    }
    return quality, [(kind, a, b, got[a], got[b]) for kind, a, b in pairs]


def contact_sheet(records: list[dict[str, Any]], pairs: list, path: Path, rng: random.Random, each: int = 8) -> None:
    """Rows of eight views: the better above the worse, of some pairs of each kind; wrong ones first."""
    rows = []
    for kind in ("results", "results of one prompt", *flaws.KINDS):
        own = [p for p in pairs if p[0] == kind]
        rng.shuffle(own)
        own.sort(key=lambda p: p[3] > p[4])
        chosen = own[: each // 2] + own[len(own) - each // 2 :]
        for _, a, b, better, worse in chosen:
            one, other = records[a], records[b]
            strength = other["flaw"]["strength"] if other["flaw"] else f"{one['distance']:.3f} {other['distance']:.3f}"
            print(
                f"{kind}: {one['object']} {one['way']} {one['iteration']} {better:.3f} over {other['way']} "
                f"{other['iteration']} {worse:.3f} {strength}"
            )
            rows.append(torch.cat([one["views"][:15:3], other["views"][:15:3]]).float() / 255)
    save_image(make_grid(F.interpolate(torch.cat(rows), size=80, mode="area"), nrow=10, pad_value=0.5), path)


def load_results(folder: Path, split: str) -> list[dict[str, Any]]:
    records = []
    for path in sorted(folder.glob("*.pt")):
        records += [r for r in torch.load(path, weights_only=False) if r["split"] == split]
    return records


def save(net: Any, folder: Path) -> None:
    """In float16, under the names that DINOv2's checkpoints have on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        net.backbone.save_pretrained(temporary)
        published = load_file(Path(temporary) / "model.safetensors")
    state = {f"backbone.{name}": value for name, value in published.items()}
    state |= {f"score_head.{name}": value for name, value in net.score_head.state_dict().items()}
    state = {name: value.detach().half().cpu().contiguous() for name, value in state.items()}
    save_file(state, folder / WEIGHTS)
    net.backbone.config.save_pretrained(folder)
    forget_paths(folder)


def main() -> None:
    args = arguments(__doc__, minutes=4)
    device, rng = args.device, random.Random(args.seed)
    records, tests = (load_results(args.work / "results", split) for split in ("train", "test"))
    print(f"quality: {len(records)} records for training, {len(tests)} of unseen shapes", flush=True)
    objects = args.objects or 4000
    records += exact_splats([training_spec(rng) for _ in range(objects // 10)], "train", device, rng)
    tests += exact_splats(test_specs()[: max(1, objects // 80)], "test", device, rng)
    print(f"quality: {len(records)} and {len(tests)} with exact splats", flush=True)
    exact = many_exact(objects, 8, device, args.seed)
    scale = label(records, device)
    label(tests, device)
    unseen, _ = framed(exact_objects(test_specs()[: max(1, objects // 80)], device, rng))
    test_renders, _ = exact_views(unseen, AZIMUTHS.expand(len(unseen), VIEWS))
    print(f"quality: distances of {scale}", flush=True)
    sampler = Sampler(records, exact, device)
    net = fresh_net().to(device)
    fused = torch.compile(net) if device == "cuda" else net

    def loss() -> Tensor:
        with torch.no_grad():
            x, worth = sampler.draw((args.batch or 64) // 8)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return objective(fused, x, worth)

    best, run = fit("quality", net, loss, args, lr=2e-3, weight_decay=0.05, decay=0.99)
    calibrate(best, records, exact[0][:200])
    folder = args.pack / "quality"
    save(best, folder)
    quality, pairs = measure(best, tests, test_renders.cpu(), args.seed)
    contact_sheet(tests, pairs, args.work / "quality_pairs.png", rng)
    write_card(
        folder, "tiny-quality", "scripts/tiny_pack/train_quality.py", args, run, quality,
        unseen_shapes=list(UNSEEN), tie_margin=MARGIN, distances=scale,
    )  # fmt: skip
    print(f"quality: {quality}", flush=True)


if __name__ == "__main__":
    main()
