"""Differentiable rasterising of 3D Gaussians: one function, on a GPU by gsplat, on a CPU by our own kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from generation.splats.cameras import Cameras, orbit
from generation.splats.gaussians import Gaussians


def rasterize(
    gaussians: Gaussians, cameras: Cameras, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Render N Gaussians from C cameras, by the device that `gaussians.means` is on.

    background: (3,) or (C, 3) colours behind everything.
    Returns
        rgb: (C, H, W, 3), at least 0 and not limited above,
        alpha: (C, H, W, 1) in 0..1,
        info: "means2d" (C, N, 2) projected centres in pixels, part of the autograd graph;
              "radii" (C, N) int, half the longer side of the splat's bounding box in pixels, 0 = not drawn;
              "depths" (C, N) along the camera's axis.
    Gradients reach every field of `gaussians`, `background` and `info["means2d"]`, not the cameras.
    Follows gsplat 1.5: 0.3 pixels^2 added to the projected covariance, near plane 0.01, alpha at most 0.999 and skipped
    under 1/255, blending ends at a transmittance of 1e-4. On a CPU, Gaussians whose place, shape or colour is not
    finite are not drawn, and have no gradient.
    Raises ValueError naming the input whose shape or type is wrong, or, on a CPU or without gradients, when the
    Gaussians are so large that the lists of what covers which part of the image would be too long.
    """
    _check(gaussians, cameras, width, height, background)
    return _backend(gaussians.means.device).rasterize(
        gaussians, cameras.to(gaussians.means.device), width, height, _each_view(background, gaussians, cameras)
    )


def rasterize_scenes(
    scenes: Sequence[tuple[Gaussians, Cameras, Tensor]], width: int, height: int
) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """`rasterize` for several scenes of Gaussians, cameras and background, as many cameras in each.

    On a GPU that is one call, in which the host waits for the device once, and not once for each scene. Results are as
    `rasterize` gives them, but "means2d" may be a tensor that scenes share, and info["own"] is the index of the scene's
    part of it.
    """
    if len({(len(cameras), gaussians.sh.shape[1]) for gaussians, cameras, _ in scenes}) > 1:
        raise ValueError("scenes that are rendered together need as many cameras and as many harmonics")
    device = scenes[0][0].means.device
    if device.type != "cuda" or len(scenes) == 1:
        results = [rasterize(*scene[:2], width, height, scene[2]) for scene in scenes]
        return [(rgb, alpha, {**info, "own": ...}) for rgb, alpha, info in results]
    for gaussians, cameras, background in scenes:
        _check(gaussians, cameras, width, height, background)
    alike = [(g, cameras.to(device), _each_view(background, g, cameras)) for g, cameras, background in scenes]
    drawn: list[tuple[Tensor, Tensor, dict[str, Any]]] = _backend(device).rasterize_scenes(alike, width, height)
    return drawn


def _check(gaussians: Gaussians, cameras: Cameras, width: int, height: int, background: Tensor) -> None:
    gaussians.check()
    views = len(cameras)
    if tuple(cameras.viewmats.shape) != (views, 4, 4) or tuple(cameras.Ks.shape) != (views, 3, 3) or views < 1:
        shapes = f"{tuple(cameras.viewmats.shape)} and {tuple(cameras.Ks.shape)}"
        raise ValueError(f"cameras have viewmats and Ks of shape {shapes}, expected (C, 4, 4) and (C, 3, 3), C >= 1")
    if width < 1 or height < 1:
        raise ValueError(f"image size is {width} x {height}, expected at least 1 x 1")
    if tuple(background.shape) not in ((3,), (views, 3)):
        raise ValueError(f"background has shape {tuple(background.shape)}, expected (3,) or ({views}, 3)")


def _each_view(background: Tensor, gaussians: Gaussians, cameras: Cameras) -> Tensor:
    return background.to(gaussians.means.device, torch.float32).expand(len(cameras), 3)


def _backend(device: torch.device) -> Any:
    if device.type == "cuda":
        from generation.splats.rasterize import gsplat

        return gsplat
    if device.type == "cpu":
        from generation.splats.rasterize import cpu

        return cpu
    raise ValueError(f"gaussians are on {device}, expected cpu or cuda")


def warm_up(device: str = "cpu") -> None:
    """Compile the CPU kernels, or load them from numba's cache, by rendering one Gaussian, forward and backward.

    It takes about 15 s the first time on a machine, under 1 s after that. On a GPU it loads gsplat's compiled code;
    raises RuntimeError with the command to run when that is not there.
    """
    one = Gaussians(torch.zeros(1, 3), torch.ones(1, 4), torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 1, 3))
    one = one.to(device)
    one.means.requires_grad_()
    rgb, alpha, _ = rasterize(one, orbit(0.0, 0.0, 2.0, 50.0, 8, 8), 8, 8, torch.ones(3))
    (rgb.sum() + alpha.sum()).backward()
