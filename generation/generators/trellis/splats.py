"""TRELLIS's Gaussians as this project holds them."""

from __future__ import annotations

from dataclasses import replace

import torch

from generation.generators.trellis.gaussian_decoder import RawGaussians
from generation.splats.frame import BOX_SIDE, PIXELS
from generation.splats.gaussians import Gaussians

#: pixels^2 that a renderer adds to a projected covariance: the one that TRELLIS was trained with, which lowers the
#: opacity by as much as it spreads it (Yu et al., 2023, arXiv:2311.16493); and validators' and viewers', which do not
TRAINED_WITH, SHOWN_WITH = 0.1, 0.3
#: pixels^2 that the thinnest axis keeps
LEAST = 1e-3


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


def sharpened(gaussians: Gaussians) -> Gaussians:
    """The same splat for a renderer that blurs more than that which it was made for.

    What is added there is taken away here, as many pixels as a splat of this size has before validators. Opacities
    stay: to take from them what the training's renderer takes was measured to bring the picture no closer.
    """
    side = (gaussians.means.amax(0) - gaussians.means.amin(0)).max().clamp_min(1e-6)
    pixels = PIXELS * BOX_SIDE / side  # of a unit
    variance = (2 * gaussians.log_scales).exp() * pixels**2
    left = (variance - (SHOWN_WITH - TRAINED_WITH)).clamp_min(LEAST)
    return replace(gaussians, log_scales=(left / pixels**2).log() / 2)
