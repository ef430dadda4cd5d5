"""TRELLIS's Gaussians as this project holds them."""

from __future__ import annotations

import torch

from generation.generators.trellis.gaussian_decoder import RawGaussians
from generation.splats.gaussians import Gaussians


def to_gaussians(raw: RawGaussians) -> Gaussians:
    """The same splat with y up, before activation.

    TRELLIS has z up: a quarter turn around x makes (x, y, z) (x, z, -y).
    """
    x, y, z = raw.means.unbind(1)
    half = 0.5**0.5
    w, i, j, k = torch.nn.functional.normalize(raw.quats, dim=1).unbind(1)
    # the quarter turn's quaternion (half, -half, 0, 0) times the Gaussian's
    quats = torch.stack([half * (w + i), half * (i - w), half * (j + k), half * (k - j)], dim=1)
    return Gaussians(
        means=torch.stack([x, z, -y], dim=1),
        quats=quats,
        log_scales=raw.scales.log(),
        logit_opacities=raw.opacities,
        sh=raw.colours[:, None],
    )


def capped(gaussians: Gaussians, most: int) -> Gaussians:
    """At most so many: those of the largest opacity times area, in their order."""
    if len(gaussians) <= most:
        return gaussians
    area = gaussians.log_scales.sort(dim=1).values[:, 1:].sum(1)  # its logarithm, of the two longer axes
    weight = torch.nn.functional.logsigmoid(gaussians.logit_opacities) + area
    kept = weight.topk(most).indices.sort().values
    return Gaussians(**{name: value[kept] for name, value in gaussians.tensors().items()})
