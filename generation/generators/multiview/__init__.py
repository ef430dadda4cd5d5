"""Diffusion models that draw several views of one object at once, which agree: from words or from a picture."""

from generation.generators.multiview.imagedream import ImageDream
from generation.generators.multiview.mvdream import MVDreamViews
from generation.generators.multiview.sampling import ViewSampling

__all__ = ["ImageDream", "MVDreamViews", "ViewSampling"]
