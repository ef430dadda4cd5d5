"""What a renderer's filter does to TRELLIS's splats, and what ``sharpened`` gives back:
``.venv/bin/python -m scripts.tools.compared_filters``.

Known objects are covered with Gaussians as TRELLIS covers a surface: 32 a voxel of 64 a side, flat, of the sizes that
its decoder starts from. The truth are four views of 518 pixels as its training renders them: 0.1 pixels^2 added to what
a Gaussian covers, and as much taken from its opacity as that spreads it. Compared with it are the same views with 0.3
added and nothing taken, as validators render.

The CPU's renderer is compiled with its filter in it, so the truth is drawn by a process of its own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from generation.generators.trellis.splats import SHOWN_WITH, TRAINED_WITH, sharpened
from generation.splats.cameras import Cameras, orbit
from generation.splats.frame import BOX_SIDE, ELEVATION, FOVY, RADIUS, VIEW_SIZE
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import rasterize


class Case(NamedTuple):
    shape: str
    opacity: float
    along: float  # standard deviation in the surface, in cubes of side 1
    across: float


CASES = (
    Case("ball", 0.95, 0.004, 0.0015),
    Case("ring", 0.95, 0.004, 0.0015),
    Case("box", 0.95, 0.004, 0.0015),
    Case("ring", 0.50, 0.004, 0.0015),
    Case("ring", 0.95, 0.0025, 0.001),
    Case("ring", 0.30, 0.0025, 0.001),
    Case("ring", 0.95, 0.007, 0.003),
)
SIDE, EACH = 64, 32


def distance(shape: str, p: Tensor) -> Tensor:
    """From points (N, 3) to the shape's surface, negative inside."""
    if shape == "ball":
        return p.norm(dim=1) - 0.35
    if shape == "ring":
        return torch.stack([p[:, [0, 2]].norm(dim=1) - 0.32, p[:, 1]], 1).norm(dim=1) - 0.12
    beyond = p.abs() - torch.tensor([0.3, 0.2, 0.4])
    return beyond.clamp_min(0).norm(dim=1) + beyond.amax(1).clamp_max(0)


def normal(shape: str, p: Tensor) -> Tensor:
    p = p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(shape, p).sum(), p)
    return F.normalize(gradient + 1e-9, dim=1)


def known(case: Case) -> Gaussians:
    """In the validators' frame."""
    g = torch.Generator().manual_seed(0)
    axis = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    cells = torch.cartesian_prod(axis, axis, axis)
    cells = cells[distance(case.shape, cells).abs() < 0.78 / SIDE]
    p = (cells[:, None] + (torch.rand(len(cells), EACH, 3, generator=g) - 0.5) * 1.5 / SIDE).flatten(0, 1)
    p = p - normal(case.shape, p) * distance(case.shape, p)[:, None]
    n = normal(case.shape, p)
    up = torch.tensor([0.0, 0.0, 1.0]).expand_as(n)
    quats = torch.cat([1 + (up * n).sum(1, keepdim=True), torch.linalg.cross(up, n)], dim=1) + 1e-8
    scales = torch.tensor([case.along, case.along, case.across]) * (0.4 * torch.randn(len(p), 3, generator=g)).exp()
    scales = (scales.square() + 0.0009**2).sqrt()
    x, y, z = (2 * math.pi * p).unbind(1)
    colours = 0.5 + torch.stack(
        [0.4 * (20 * x).sin() * (13 * y).cos(), 0.4 * (9 * y + 3 * z).sin().sign(), 0.3 * (31 * z).sin()], dim=1
    )
    grown = BOX_SIDE / float((p.amax(0) - p.amin(0)).max())
    opacities = torch.full((len(p),), case.opacity).logit()
    return Gaussians(p * grown, quats, (scales * grown).log(), opacities, ((colours - 0.5) / SH_C0)[:, None])


def cameras() -> Cameras:
    return orbit(ELEVATION, torch.tensor([0.0, 96.0, 168.0, 264.0]), RADIUS, FOVY, VIEW_SIZE, VIEW_SIZE)


def render(gaussians: Gaussians, views: Cameras) -> Tensor:
    rgb, _, _ = rasterize(gaussians, views, VIEW_SIZE, VIEW_SIZE, torch.ones(3))
    return rgb.clamp(0, 1)


def covered(gaussians: Gaussians, views: Cameras, number: int) -> Tensor:
    """(N, 2, 2) what Gaussians cover of a view, in pixels^2."""
    rotation, shift, focal = views.viewmats[number, :3, :3], views.viewmats[number, :3, 3], views.Ks[number, 0, 0]
    x, y, z = (gaussians.means @ rotation.T + shift).unbind(1)
    zero = torch.zeros_like(z)
    slopes = torch.stack(
        [torch.stack([1 / z, zero, -x / z**2], 1), torch.stack([zero, 1 / z, -y / z**2], 1)], dim=1
    )  # fmt: skip
    half = focal * slopes @ rotation @ (gaussians.rotations() * gaussians.log_scales.exp()[:, None])
    return half @ half.transpose(1, 2)


def truth(folder: Path) -> None:
    """The views as the training renders them, one file a case. In a process that draws nothing else."""
    from generation.splats.rasterize import _projection

    _projection.BLUR = _projection.f32(TRAINED_WITH)
    views = cameras()
    for number, case in enumerate(CASES):
        gaussians, drawn = known(case), []
        for view in range(len(views)):
            area = covered(gaussians, views, view)
            kept = (area.det() / (area + TRAINED_WITH * torch.eye(2)).det()).clamp_min(0).sqrt()
            opacities = (gaussians.logit_opacities.sigmoid() * kept).clamp(1e-6, 1 - 1e-6).logit()
            drawn.append(render(replace(gaussians, logit_opacities=opacities), views[[view]]))
        torch.save(torch.cat(drawn), folder / f"{number}.pt")


def against(views: Tensor, true: Tensor) -> tuple[float, float]:
    """Peak signal to noise in dB, and SSIM."""
    noise = float((views - true).square().mean())
    alike: Any = structural_similarity_index_measure(
        views.permute(0, 3, 1, 2), true.permute(0, 3, 1, 2), data_range=1.0
    )
    return -10 * math.log10(noise), float(alike)


def main() -> None:
    if len(sys.argv) > 1:
        truth(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        own = {**os.environ, "NUMBA_CACHE_DIR": f"{name}/numba"}  # or the kernel with the usual filter would be found
        subprocess.run([sys.executable, "-m", "scripts.tools.compared_filters", name], env=own, check=True)
        print(
            f"| Gaussians | as they are ({SHOWN_WITH} added): dB | SSIM | sharpened: dB | SSIM |\n|---|---|---|---|---|"
        )
        for number, case in enumerate(CASES):
            true, gaussians, views = torch.load(Path(name) / f"{number}.pt"), known(case), cameras()
            plain, sharp = (against(render(each, views), true) for each in (gaussians, sharpened(gaussians)))
            what = f"{case.shape}, {len(gaussians):,}, opacity {case.opacity}, {case.along} along, {case.across} across"
            print(f"| {what} | {plain[0]:.1f} | {plain[1]:.4f} | {sharp[0]:.1f} | {sharp[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
