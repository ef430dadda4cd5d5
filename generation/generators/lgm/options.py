"""Options of LGM. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from generation.schema.limits import MAX_GAUSSIANS, MIN_GAUSSIANS
from generation.schema.options import GeneratorOptions, Template


class LgmOptions(GeneratorOptions):
    """Where LGM's views come from (Tang et al., 2024, arXiv:2402.05054), and what their models are told.

    The defaults are the authors', for a picture.
    """

    CHECKPOINTS: ClassVar[tuple[str, ...]] = ("lgm", "imagedream", "mvdream")

    generator: Literal["lgm"] = "lgm"
    #: What the views are drawn from: a picture, by ImageDream; words, by MVDream; or both, by an MVDream that was
    #: trained for it. There the first view is the picture, and words may be missing.
    views_from: Literal["picture", "words", "picture_and_words"] = "picture"
    view_steps: int = Field(30, ge=1, le=1000)  # of denoising
    guidance_scale: float = Field(5.0, ge=0, le=1000)
    negative_prompt: str = Field("", max_length=1024)
    prompt_template: Template = (
        "{prompt}, a single object, whole, centered, front view at eye level, plain white background"
    )
    #: what the model that draws the views is told; where there is a picture it needs none
    view_template: Template = "{prompt}, 3d asset"
    #: cut each drawn view out, and put it into the middle of the network's background, as the authors do after MVDream
    recentre_views: bool = False

    #: A validator rejects splats of fewer. Where the network gives fewer, faint ones are replaced by several that look
    #: the same together.
    min_gaussians: int = Field(MIN_GAUSSIANS, ge=0, le=65_536)
    max_gaussians: int = Field(65_536, ge=1, le=MAX_GAUSSIANS)  # those that are most opaque

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.min_gaussians > self.max_gaussians:
            raise ValueError(f"min_gaussians {self.min_gaussians} is over max_gaussians {self.max_gaussians}")
        if self.recentre_views and self.views_from == "picture_and_words":
            raise ValueError("recentre_views true would move the picture's view apart from the others'")
        return self

    @property
    def checkpoints(self) -> Mapping[str, str]:
        """See ``GeneratorOptions.checkpoints``."""
        multiview = "imagedream" if self.views_from == "picture" else "mvdream"
        return {"lgm": "generator is lgm", multiview: f"views_from is {self.views_from}"}

    @property
    def draws(self) -> bool:
        """See ``GeneratorOptions.draws``."""
        return self.views_from != "words"

    def picture_prompt(self, words: str) -> str:
        """What text to image is asked for."""
        return self.prompt_template.replace("{prompt}", words)

    def view_prompt(self, words: str) -> str:
        """What the model that draws views is told; nothing without words, or where it has a picture alone."""
        return self.view_template.replace("{prompt}", words) if words and self.views_from != "picture" else ""
