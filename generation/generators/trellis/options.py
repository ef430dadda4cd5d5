"""Options of TRELLIS. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from generation.schema.limits import MAX_GAUSSIANS, MIN_GAUSSIANS
from generation.schema.options import GeneratorOptions, Template, UnitInterval

Steps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=0, le=100)]
Interval = tuple[UnitInterval, UnitInterval]  # of t, 1 is noise and 0 the end; both ends are in it
Rescale = Annotated[float, Field(ge=1, le=100)]


class TrellisOptions(GeneratorOptions):
    """How TRELLIS (Xiang et al., 2024, arXiv:2412.01506) samples. The defaults are those of its ``pipeline.json``."""

    CHECKPOINTS: ClassVar[tuple[str, ...]] = ("trellis", "dinov2")

    generator: Literal["trellis"] = "trellis"
    prompt_template: Template = "{prompt}, a single object, whole, centered, three-quarter view, plain white background"
    # Which voxels there are. Guidance s is (1 + s) times the velocity with the picture, minus s times that without.
    structure_steps: Steps = 25
    structure_guidance: Guidance = 5.0
    structure_interval: Interval = (0.5, 1.0)  # where there is guidance
    structure_rescale: Rescale = 3.0  # above 1: more of the steps where t is large
    structures: int = Field(1, ge=1, le=8)  # sampled; the one with the fewest voxels is kept
    max_voxels: int = Field(32_768, ge=MIN_GAUSSIANS // 32, le=262_144)  # its authors trained with at most 32,768
    # What is in them.
    slat_steps: Steps = 25
    slat_guidance: Guidance = 5.0
    slat_interval: Interval = (0.5, 1.0)
    slat_rescale: Rescale = 3.0
    # A voxel has 32 Gaussians; those of the least opacity times area are left out.
    max_gaussians: int = Field(800_000, ge=MIN_GAUSSIANS, le=MAX_GAUSSIANS)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for name in ("structure_interval", "slat_interval"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} {low:g} to {high:g}: must begin with its lower end")
        return self

    def picture_prompt(self, words: str) -> str:
        return self.prompt_template.replace("{prompt}", words)
