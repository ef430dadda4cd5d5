"""Make exact renders look like splats: soft, speckled, a little off in place and tone."""

from __future__ import annotations

import torch
from torch.nn.functional import affine_grid, grid_sample, interpolate


def like_splats(rgba: torch.Tensor) -> torch.Tensor:
    """Premultiplied RGBA (N, 4, S, S) -> RGB (N, 3, S, S) on white, degraded at random."""
    n, _, size, _ = rgba.shape
    device = rgba.device

    def chance(p: float) -> torch.Tensor:
        return torch.rand(n, 1, 1, 1, device=device) < p

    for low in (0.5, 0.33):
        small = interpolate(rgba, scale_factor=low, mode="area")
        rgba = torch.where(chance(0.35), interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1), rgba)
    holes = (
        torch.rand(n, 1, size // 3, size // 3, device=device) > 0.12 * torch.rand(n, 1, 1, 1, device=device)
    ).float()
    rgba = torch.where(chance(0.3), rgba * interpolate(holes, size=(size, size), mode="bilinear"), rgba)
    floaters = interpolate(torch.rand(n, 1, size // 4, size // 4, device=device), size=(size, size), mode="bilinear")
    haze = ((floaters - 0.93) * 6).clamp(0, 0.6) * torch.rand(n, 1, 1, 1, device=device)
    tone = torch.rand(n, 3, 1, 1, device=device)
    hazy = torch.cat([rgba[:, :3] * (1 - haze) + tone * haze, rgba[:, 3:] * (1 - haze) + haze], 1)
    rgba = torch.where(chance(0.25), hazy, rgba)
    image = rgba[:, :3] + 1 - rgba[:, 3:]
    theta = torch.zeros(n, 2, 3, device=device)
    scale = 1 + (torch.rand(n, device=device) - 0.5) * 0.2
    angle = (torch.rand(n, device=device) - 0.5) * 0.15
    theta[:, 0, 0] = theta[:, 1, 1] = scale * angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -scale * angle.sin(), scale * angle.sin()
    theta[:, :, 2] = (torch.rand(n, 2, device=device) - 0.5) * 0.16
    image = 1 - grid_sample(1 - image, affine_grid(theta, list(image.shape), align_corners=False), align_corners=False)
    gain = 1 + (torch.rand(n, 1, 1, 1, device=device) - 0.5) * 0.2
    cast = 1 + (torch.rand(n, 3, 1, 1, device=device) - 0.5) * 0.08
    noise = torch.randn_like(image) * 0.04 * torch.rand(n, 1, 1, 1, device=device)
    return (image * gain * cast + noise).clamp(0, 1)
