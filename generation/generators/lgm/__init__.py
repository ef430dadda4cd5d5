"""Four views, or so, to Gaussians in one pass: LGM."""

from generation.generators.lgm.network import BIG, LGM, Config, plucker_rays, to_gaussians

__all__ = ["BIG", "LGM", "Config", "plucker_rays", "to_gaussians"]
