"""How alike neighbouring views are: SSIM (Wang et al., 2004) and LPIPS (Zhang et al., 2018, arXiv:1801.03924)."""

from __future__ import annotations

import math
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image.lpips import _NoTrainLpips

from generation.stages.self_check.outliers import drop_outliers, geometric_mean
from generation.weights.registry import WeightsError

LPIPS_SIZE = 256  # pixels
# Of SSIM's window.
_DEVIATION, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2


def ssim_term(views: Tensor) -> float:
    """What enters the final score: each view (V, 3, H, W; 0..1) with the next one, round the circle."""
    return geometric_mean(drop_outliers(neighbour_ssim(views)))


def neighbour_ssim(views: Tensor) -> Tensor:
    """SSIM (V,), float64 on the CPU, of each view (V, 3, H, W; 0..1) with the next one, round the circle.

    As torchmetrics computes it: borders are mirrored, so that windows reach over them. The window is separable, and a
    view's mean and variance serve both of its pairs.
    """
    after = views.roll(-1, dims=0)
    mean = _blur(views)
    square = mean * mean
    variance = (_blur(views * views) - square).clamp_min(0)
    product = mean * mean.roll(-1, dims=0)
    covariance = _blur(views * after) - product
    upper = (2 * product + _C1) * (2 * covariance + _C2)
    lower = (square + square.roll(-1, dims=0) + _C1) * (variance + variance.roll(-1, dims=0) + _C2)
    return (upper / lower).mean(dim=(1, 2, 3)).double().cpu()


def _blur(images: Tensor) -> Tensor:
    """With SSIM's window, borders mirrored. Sums of shifted pictures: on a CPU, four times as fast as a convolution."""
    window = [math.exp(-(offset**2) / (2 * _DEVIATION**2)) for offset in range(-_RADIUS, _RADIUS + 1)]
    weights = [weight / sum(window) for weight in window]
    padded = F.pad(images, (_RADIUS,) * 4, mode="reflect")
    for dim in (-1, -2):
        size = images.shape[dim]
        blurred = padded.narrow(dim, 0, size) * weights[0]
        for offset, weight in enumerate(weights[1:], 1):
            blurred.add_(padded.narrow(dim, offset, size), alpha=weight)
        padded = blurred
    return padded


class Lpips:
    """LPIPS with AlexNet."""

    def __init__(self, net: _NoTrainLpips, device: str) -> None:
        self._net, self._device = net.to(device).requires_grad_(False), device

    @classmethod
    def load(cls, path: Path, device: str) -> Lpips:
        """With torchvision's checkpoint of AlexNet; the small layers behind it come with torchmetrics.

        Left to themselves, torchmetrics and torchvision would fetch the checkpoint. Raises WeightsError.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            with torch.random.fork_rng():
                net = _NoTrainLpips(net="alex", pnet_rand=True)
            # "slice2.3.weight" there is "features.3.weight" here.
            features = {name: state[f"features.{name.partition('.')[2]}"] for name in net.net.state_dict()}
            net.net.load_state_dict(features, strict=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
            raise WeightsError(f"{path}: not a usable AlexNet: {' '.join(str(error).split())[:300]}") from error
        return cls(net, device)

    @torch.no_grad()
    def distances(self, views: Tensor) -> Tensor:
        """LPIPS (V,), float64 on the CPU, of each view (V, 3, H, W; 0..1) with the next one, round the circle."""
        size = (LPIPS_SIZE, LPIPS_SIZE)
        views = views.to(self._device, torch.float32)
        small = F.interpolate(views, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
        after = small.roll(-1, dims=0)
        distances = self._net(small, after, normalize=True).flatten()
        # Equal pictures are at no distance, whatever kernels make of them in two places of a batch.
        equal = (small == after).flatten(1).all(1)
        return distances.masked_fill(equal, 0).double().cpu()

    def term(self, views: Tensor) -> float:
        """What enters the final score: 1 minus the mean distance of what is kept. A kept distance of 0 makes it 1."""
        return 1 - geometric_mean(drop_outliers(self.distances(views)))
