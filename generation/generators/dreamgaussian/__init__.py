"""Text and one view to Gaussians: DreamGaussian's optimisation under a diffusion model's guidance."""

from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from generation.generators.dreamgaussian.guidance.zero123 import Zero123
from generation.generators.dreamgaussian.optimiser import DreamGaussian
from generation.generators.dreamgaussian.scene import Scene

__all__ = ["DreamGaussian", "MVDream", "Scene", "Zero123"]
