"""The rasteriser written out: every pixel times every Gaussian in float64, gradients by PyTorch. For tests alone."""

from __future__ import annotations

import torch
from torch import Tensor

from generation.splats.cameras import Cameras

ALPHA_MIN, ALPHA_MAX, TRANSMITTANCE_MIN, BLUR, NEAR = 1 / 255, 0.999, 1e-4, 0.3, 0.01
DOUBT = 1e-4  # a comparison closer than this, relatively, may go the other way in float32


def sh_basis(d: Tensor, coefficients: int) -> Tensor:
    """(N, 3) unit directions -> (N, K), real spherical harmonics with the signs of 3DGS."""
    x, y, z = d.unbind(1)
    pi = torch.pi
    terms = [torch.full_like(x, (1 / (4 * pi)) ** 0.5)]
    c1 = (3 / (4 * pi)) ** 0.5
    terms += [-c1 * y, c1 * z, -c1 * x]
    a, b, c = (15 / (4 * pi)) ** 0.5, (5 / (16 * pi)) ** 0.5, (15 / (16 * pi)) ** 0.5
    terms += [a * x * y, -a * y * z, b * (3 * z * z - 1), -a * x * z, c * (x * x - y * y)]
    e, f = (35 / (32 * pi)) ** 0.5, (105 / (4 * pi)) ** 0.5
    g, h, i = (21 / (32 * pi)) ** 0.5, (7 / (16 * pi)) ** 0.5, (105 / (16 * pi)) ** 0.5
    terms += [
        -e * y * (3 * x * x - y * y),
        f * x * y * z,
        -g * y * (5 * z * z - 1),
        h * z * (5 * z * z - 3),
        -g * x * (5 * z * z - 1),
        i * z * (x * x - y * y),
        -e * x * (x * x - 3 * y * y),
    ]
    return torch.stack(terms[:coefficients], dim=1)


def rotation_matrices(quats: Tensor) -> Tensor:
    w, x, y, z = torch.nn.functional.normalize(quats, dim=1).unbind(1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def render(
    fields: dict[str, Tensor], cameras: Cameras, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """All inputs float64, background (C, 3).

    Returns rgb (C, H, W, 3), alpha (C, H, W, 1), the views' means2d, each (N, 2) in the graph, and a mask (C, H, W) of
    the pixels where some comparison is so close that float32 may decide it otherwise.
    """
    views = [
        _render_view(fields, cameras.viewmats[c].double(), cameras.Ks[c].double(), width, height, background[c])
        for c in range(len(cameras))
    ]
    rgb, alpha, means2d, doubtful = zip(*views, strict=True)
    return torch.stack(rgb), torch.stack(alpha), list(means2d), torch.stack(doubtful)


def _close(value: Tensor, to: float | Tensor, relative: float = DOUBT) -> Tensor:
    to = torch.as_tensor(to, dtype=value.dtype)
    return (value - to).abs() <= relative * to.abs().clamp_min(0.1 * relative)


def _render_view(
    fields: dict[str, Tensor], viewmat: Tensor, K: Tensor, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W, t = viewmat[:3, :3], viewmat[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    camera = fields["means"] @ W.T + t
    depth = camera[:, 2]
    front = depth >= NEAR
    z = torch.where(front, depth, torch.ones_like(depth))
    slope = camera[:, :2] / z[:, None]
    focal, centre = torch.stack([fx, fy]), torch.stack([cx, cy])
    means2d = focal * slope + centre

    size = torch.tensor([width, height], dtype=z.dtype)
    low, high = (-centre - 0.15 * size) / focal, (size - centre + 0.15 * size) / focal
    limited = torch.minimum(torch.maximum(slope, low), high)
    zero = torch.zeros_like(z)
    J = torch.stack(
        [
            torch.stack([fx / z, zero, -fx * limited[:, 0] / z], dim=1),
            torch.stack([zero, fy / z, -fy * limited[:, 1] / z], dim=1),
        ],
        dim=1,
    )
    M = rotation_matrices(fields["quats"]) * fields["log_scales"].exp()[:, None]
    A = J @ W @ M
    conics = (A @ A.transpose(1, 2) + BLUR * torch.eye(2, dtype=A.dtype)).inverse()

    directions = torch.nn.functional.normalize(fields["means"] + W.T @ t, dim=1)
    basis = sh_basis(directions, fields["sh"].shape[1])
    unclamped = (basis[:, :, None] * fields["sh"]).sum(1) + 0.5
    colours = unclamped.clamp_min(0)

    order = torch.argsort(depth.detach(), stable=True)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).reshape(-1, 1, 2).double()
    d = means2d[order] - pixels
    sigma = 0.5 * torch.einsum("pni,nij,pnj->pn", d, conics[order], d)
    full = fields["logit_opacities"][order].sigmoid() * torch.exp(-sigma)
    alpha = full.clamp_max(ALPHA_MAX)
    alpha = torch.where((alpha >= ALPHA_MIN) & front[order], alpha, torch.zeros_like(alpha))
    after_all = torch.cumprod(1 - alpha, dim=1)
    alpha = torch.where(after_all > TRANSMITTANCE_MIN, alpha, torch.zeros_like(alpha))
    after = torch.cumprod(1 - alpha, dim=1)
    before = torch.cat([after.new_ones(len(after), 1), after], dim=1)
    left = before[:, -1:]
    rgb = (before[:, :-1] * alpha) @ colours[order] + left * background

    with torch.no_grad():
        seen = full >= 0.9 * ALPHA_MIN
        uncertain = _close(depth, NEAR, 1e-3) | _close(slope, low).any(1) | _close(slope, high).any(1)
        uncertain |= (unclamped.abs() < 1e-5).any(1)
        doubt = seen & uncertain[order]
        doubt |= _close(full, ALPHA_MIN) | _close(full, ALPHA_MAX) | (seen & _close(after_all, TRANSMITTANCE_MIN, 1e-3))
        in_order = depth[order]
        swapped = _close(in_order[1:], in_order[:-1], 1e-5)
        doubt[:, 1:] |= seen[:, 1:] & seen[:, :-1] & swapped
        reached = (
            torch.cat([after_all.new_ones(len(after_all), 1), after_all], dim=1)[:, :-1] > 0.99 * TRANSMITTANCE_MIN
        )
        doubtful = (doubt & reached).any(1).reshape(height, width)
    return rgb.reshape(height, width, 3), 1 - left.reshape(height, width, 1), means2d, doubtful
