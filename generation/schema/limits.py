"""Limits that are known before any package is there."""

from __future__ import annotations

#: A validator rejects splats of fewer.
MIN_GAUSSIANS = 7000
MAX_GAUSSIANS = 2_000_000
