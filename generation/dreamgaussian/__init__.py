"""Text and one view to Gaussians: DreamGaussian's optimisation under a diffusion model's guidance."""

from generation.dreamgaussian.guidance.mvdream import MVDream
from generation.dreamgaussian.guidance.zero123 import Zero123
from generation.dreamgaussian.optimiser import DreamGaussian
from generation.dreamgaussian.scene import Scene

__all__ = ["DreamGaussian", "MVDream", "Scene", "Zero123"]
