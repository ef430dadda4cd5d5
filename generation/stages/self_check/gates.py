"""Gates: the validators' hard rules, and limits of the .spz format."""

from __future__ import annotations

import torch.nn.functional as F

from generation.schema.limits import MIN_GAUSSIANS
from generation.schema.results import GateResult
from generation.splats.gaussians import Gaussians

# The validators' rules.
MIN_OPACITY = 0.001
MAX_TRANSPARENT_SHARE = 0.8

# Ours. The .spz that carries a splat holds coordinates up to 2**11 in steps of 2**-12, so a box outside of these limits
# would not arrive; its rotations are in steps of 1/127.5, so anything closer than that to identity arrives as identity.
MIN_BOX_SIDE, MAX_COORDINATE = 0.05, 2047.0
MIN_ROTATION = 0.005


def run_gates(gaussians: Gaussians) -> dict[str, GateResult]:
    """The result of each gate by name, in the order of reports."""
    count = len(gaussians)
    values = list(gaussians.tensors().values())
    finite = sum(int(value.isfinite().sum()) for value in values) / max(1, sum(value.numel() for value in values))
    transparent = int((gaussians.logit_opacities.sigmoid() < MIN_OPACITY).sum()) / count if count else 1.0
    rotation = float(F.normalize(gaussians.quats, dim=1)[:, 1:].abs().max()) if count else 0.0
    side = float((gaussians.means.amax(0) - gaussians.means.amin(0)).max()) if count else 0.0
    farthest = float(gaussians.means.abs().max()) if count else 0.0

    def gate(passed: bool, value: float, limit: float, words: str) -> GateResult:
        return GateResult(passed, value, limit, "" if passed else words)

    return {
        "finite": gate(
            finite == 1 or not count, finite, 1.0,
            f"finite: {1 - finite:.3g} of the values are not finite, none may be",
        ),
        "min_gaussians": gate(
            count >= MIN_GAUSSIANS, count, MIN_GAUSSIANS,
            f"min_gaussians: {count} Gaussians are under the limit of {MIN_GAUSSIANS}",
        ),
        "opacity": gate(
            transparent <= MAX_TRANSPARENT_SHARE, transparent, MAX_TRANSPARENT_SHARE,
            f"opacity: {transparent:.1%} of the Gaussians are invisible, over the limit of {MAX_TRANSPARENT_SHARE:.0%}",
        ),
        "rotations": gate(
            rotation >= MIN_ROTATION, rotation, MIN_ROTATION,
            f"rotations: all are within {rotation:.4f} of identity, the limit is {MIN_ROTATION}",
        ),
        "box_side": gate(
            side >= MIN_BOX_SIDE, side, MIN_BOX_SIDE,
            f"box_side: the longest side of the bounding box is {side:.4g}, under the limit of {MIN_BOX_SIDE}",
        ),
        "max_coordinate": gate(
            farthest <= MAX_COORDINATE, farthest, MAX_COORDINATE,
            f"max_coordinate: a coordinate reaches {farthest:.4g}, over the limit of {MAX_COORDINATE:g}",
        ),
    }  # fmt: skip
