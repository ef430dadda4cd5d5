"""Multi-view diffusion models: several consistent views of one object at once, from a text or from a picture."""

from generation.generators.multiview.imagedream import ImageDream
from generation.generators.multiview.mvdream import MVDreamViews
from generation.generators.multiview.sampling import ViewSampling

__all__ = ["ImageDream", "MVDreamViews", "ViewSampling"]
