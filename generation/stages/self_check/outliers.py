"""The validators' aggregation over views: drop outliers, then take the geometric mean."""

from __future__ import annotations

import torch
from torch import Tensor

# Their outlier rule: distance to the 5th nearest of the other views' figures, the largest tenth goes.
NEIGHBOURS, CONTAMINATION = 5, 0.1


def drop_outliers(values: Tensor) -> Tensor:
    """Values (V,) without the tenth that lies farthest from its 5th nearest neighbour (kNN detection, as in PyOD)."""
    if len(values) <= NEIGHBOURS:
        return values
    distance = (values[:, None] - values[None, :]).abs().sort(dim=1).values[:, NEIGHBOURS]  # [:, 0] is itself
    return values[distance <= torch.quantile(distance, 1 - CONTAMINATION)]


def geometric_mean(values: Tensor) -> float:
    """Of values (V,). One that is 0 makes it 0; a negative one, NaN."""
    return float(values.log().mean().exp())
