"""The rasteriser written out: every pixel times every Gaussian in float64, gradients by PyTorch. Slow, for tests alone."""

from __future__ import annotations

import torch
from torch import Tensor

from generation.splats.cameras import Cameras

ALPHA_MIN, ALPHA_MAX, TRANSMITTANCE_MIN, BLUR, NEAR = 1 / 255, 0.999, 1e-4, 0.3, 0.01


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
) -> tuple[Tensor, Tensor, Tensor]:
    """rgb (C, H, W, 3), alpha (C, H, W, 1), means2d (C, N, 2) in the graph; background (C, 3)."""
    images, alphas, centres = [], [], []
    for view in range(len(cameras)):
        rgb, alpha, means2d = _render_view(
            fields, cameras.viewmats[view].double(), cameras.Ks[view].double(), width, height, background[view]
        )
        images.append(rgb)
        alphas.append(alpha)
        centres.append(means2d)
    return torch.stack(images), torch.stack(alphas), centres


def _render_view(
    fields: dict[str, Tensor], viewmat: Tensor, K: Tensor, width: int, height: int, background: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    W, t = viewmat[:3, :3], viewmat[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    camera = fields["means"] @ W.T + t
    front = camera[:, 2] >= NEAR
    x, y = camera[:, 0], camera[:, 1]
    z = torch.where(front, camera[:, 2], torch.ones_like(camera[:, 2]))
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], dim=1)

    R = rotation_matrices(fields["quats"])
    M = R * fields["log_scales"].exp()[:, None]
    margin_x, margin_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    u = (x / z).clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    v = (y / z).clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    J = torch.stack(
        [torch.stack([fx / z, zero, -fx * u / z], dim=1), torch.stack([zero, fy / z, -fy * v / z], dim=1)], dim=1
    )
    A = J @ W @ M
    covariances = A @ A.transpose(1, 2) + BLUR * torch.eye(2, dtype=A.dtype)
    conics = covariances.inverse()

    directions = torch.nn.functional.normalize(fields["means"] + W.T @ t, dim=1)
    basis = sh_basis(directions, fields["sh"].shape[1])
    colours = ((basis[:, :, None] * fields["sh"]).sum(1) + 0.5).clamp_min(0)

    order = torch.argsort(camera[:, 2].detach(), stable=True)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1).reshape(-1, 1, 2).double()
    d = means2d[order] - pixels
    sigma = 0.5 * torch.einsum("pni,nij,pnj->pn", d, conics[order], d)
    alpha = (fields["logit_opacities"][order].sigmoid() * torch.exp(-sigma)).clamp_max(ALPHA_MAX)
    alpha = torch.where((alpha >= ALPHA_MIN) & front[order], alpha, torch.zeros_like(alpha))
    after = torch.cumprod(1 - alpha, dim=1)
    alpha = torch.where(after > TRANSMITTANCE_MIN, alpha, torch.zeros_like(alpha))
    after = torch.cumprod(1 - alpha, dim=1)
    before = torch.cat([torch.ones_like(after[:, :1]), after], dim=1)
    weights = before[:, :-1] * alpha
    left = before[:, -1:]
    rgb = weights @ colours[order] + left * background
    return rgb.reshape(height, width, 3), 1 - left.reshape(height, width, 1), means2d
