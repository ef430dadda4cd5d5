"""How far a result is from what was asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 112  # pixels at which views are compared


def compared(rgb: Tensor, alpha: Tensor) -> Tensor:
    """RGBA (V, 4, S, S), premultiplied, 0..1, of bytes on white (V, 3, ...) and alphas (V, 1, ...)."""
    rgb, alpha = rgb.float() / 255, alpha.float() / 255
    rgba = torch.cat([rgb - (1 - alpha), alpha], 1).clamp(0, 1)
    return F.interpolate(rgba, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)


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
