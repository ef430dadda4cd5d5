"""Options of DreamGaussian. No torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from generation.schema.limits import MAX_GAUSSIANS
from generation.schema.options import GeneratorOptions, Template, UnitInterval

log = logging.getLogger("generation.generators.dreamgaussian")

#: Degrees above and below the horizon that training cameras stay within.
HIGHEST = 80.0
#: What {view} stands for in a template, by the least elevation (degrees up) of its camera.
VIEWS = (
    (45, "front view from high above"),
    (5, "front view from slightly above"),
    (-5, "front view at eye level"),
    (-45, "front view from slightly below"),
    (-90, "front view from far below"),
)

Colour = tuple[UnitInterval, UnitInterval, UnitInterval]
Weight = Annotated[float, Field(ge=0, le=1e6)]
LearningRate = Annotated[float, Field(ge=0, le=1)]
Iteration = Annotated[int, Field(ge=0, le=1_000_000)]
Interval = Annotated[int, Field(ge=1, le=1_000_000)]


class DreamGaussianOptions(GeneratorOptions):
    """Options of one optimisation (Tang et al., 2023, arXiv:2309.16653), under the names that upstream's YAMLs use.

    The defaults are those of upstream's ``text_mv.yaml``.
    """

    CHECKPOINTS: ClassVar[tuple[str, ...]] = ("mvdream", "zero123", "stable_zero123")

    generator: Literal["dreamgaussian"] = "dreamgaussian"
    # Reference view. Elevation in degrees with upstream's sign: negative looks down on the object.
    elevation: float = Field(0, ge=-90, le=90)
    ref_size: int = Field(256, ge=16, le=2048)  # pixels
    # Loop and losses.
    iters: int = Field(500, ge=1, le=10_000)
    batch_size: int = Field(1, ge=1, le=16)  # camera draws an iteration; MVDream renders 4 views for each
    lambda_sd: Weight = 1.0  # of MVDream, which reads the prompt
    lambda_zero123: Weight = 0.0  # of Zero123, which sees the reference view
    stable_zero123: bool = False  # Stable Zero123 in place of Zero123-XL
    lambda_reference: Weight = 1.0  # colour and mask loss against the reference view
    lambda_views: Weight = 0.0  # colour and mask loss against the views that the guidance sampled
    mvdream: bool = True
    guidance_scale: float = Field(50.0, ge=0, le=1000)
    negative_prompt: str = Field("", max_length=1024)
    anneal_timestep: bool = True
    warmup_rgb_loss: bool = True
    # Training cameras and background.
    radius: float = Field(2.5, ge=0.1, le=100)  # world units
    fovy: float = Field(49.1, ge=1, le=170)  # degrees
    min_ver: float = Field(-30, ge=-90, le=90)  # degrees of elevation around the reference's, with its sign
    max_ver: float = Field(30, ge=-90, le=90)
    render_size: int | None = Field(None, ge=16, le=2048)  # pixels; None: upstream's 128, 256, 512 as training goes on
    invert_bg_prob: UnitInterval = 0.5  # share of iterations on white, the others on black
    background: Literal["random"] | Colour = "random"  # or one RGB for every iteration, which sampled views have too
    # Gaussians and their start.
    num_pts: int = Field(5000, ge=1, le=MAX_GAUSSIANS)
    max_gaussians: int = Field(500_000, ge=1, le=MAX_GAUSSIANS)
    sh_degree: int = Field(0, ge=0, le=3)
    init: Literal["ball", "views"] = "ball"  # random points, or carved from views that the guidance samples
    init_views_steps: int = Field(30, ge=1, le=1000)  # denoising steps for those views
    # What models are told. {view} is where the elevation has the reference view's camera; MVDream's is its authors'
    # (github.com/bytedance/MVDream, the suffix of scripts/t2i.py), the tag of all objects that it was trained on.
    prompt_template: Template = "{prompt}, a single object, whole, centered, {view}, plain white background"
    mvdream_template: Template = "{prompt}, 3d asset"
    # Learning rates.
    position_lr_init: LearningRate = 0.001
    position_lr_final: LearningRate = 0.00002
    position_lr_delay_mult: LearningRate = 0.02
    position_lr_max_steps: Interval = 300
    feature_lr: LearningRate = 0.01
    opacity_lr: LearningRate = 0.05
    scaling_lr: LearningRate = 0.005
    rotation_lr: LearningRate = 0.005
    # Adaptive density control.
    percent_dense: UnitInterval = 0.01
    density_start_iter: Iteration = 0
    density_end_iter: Iteration = 3000
    densification_interval: Interval = 50
    opacity_reset_interval: Interval = 700
    densify_grad_threshold: float = Field(0.01, ge=0, le=1000)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """Refuse what contradicts something else. Upstream's configs must load: some of their keys have no effect."""
        o = self
        above = -o.elevation
        contradictions = {
            f"min_ver {o.min_ver:g} is over max_ver {o.max_ver:g}": o.min_ver > o.max_ver,
            f"elevation {o.elevation:g} with min_ver {o.min_ver:g} and max_ver {o.max_ver:g} leaves no camera within "
            f"{HIGHEST:g} degrees of the horizon": above - o.max_ver > HIGHEST or above - o.min_ver < -HIGHEST,
            f"density_start_iter {o.density_start_iter} is after density_end_iter {o.density_end_iter}":
                o.density_start_iter > o.density_end_iter,
            f"num_pts {o.num_pts} is over max_gaussians {o.max_gaussians}": o.num_pts > o.max_gaussians,
            f"position_lr_final {o.position_lr_final:g} is over position_lr_init {o.position_lr_init:g}":
                0 < o.position_lr_init < o.position_lr_final,
            "init views asks for views of MVDream, which mvdream false turns off": o.init == "views" and not o.mvdream,
            f"lambda_views {o.lambda_views:g} weighs views that init {o.init} does not sample":
                o.lambda_views > 0 and o.init != "views",
            "stable_zero123 true is of no use with lambda_zero123 0": o.stable_zero123 and o.lambda_zero123 == 0,
            "lambda_sd, lambda_zero123, lambda_reference and lambda_views are all 0: there is nothing to follow":
                o.lambda_sd == o.lambda_zero123 == o.lambda_reference == o.lambda_views == 0,
        }  # fmt: skip
        if found := [words for words, contradicts in contradictions.items() if contradicts]:
            raise ValueError("; ".join(found))
        return self

    @property
    def checkpoints(self) -> Mapping[str, str]:
        """See ``GeneratorOptions.checkpoints``."""
        asked = {}
        if self.lambda_sd > 0 or self.init == "views":
            asked["mvdream"] = f"lambda_sd is {self.lambda_sd} and init {self.init}"
        if self.lambda_zero123 > 0:
            name = "stable_zero123" if self.stable_zero123 else "zero123"
            asked[name] = f"lambda_zero123 is {self.lambda_zero123}"
        return asked

    def picture_prompt(self, words: str) -> str:
        """A picture as the reference view's camera sees the object."""
        view = next(text for least, text in VIEWS if -self.elevation >= least)
        return self.prompt_template.replace("{view}", view).replace("{prompt}", words)

    def mvdream_prompt(self, words: str) -> str:
        """What MVDream is asked for; nothing where there are no words."""
        return self.mvdream_template.replace("{prompt}", words) if words else ""

    def capped(self, most: int) -> Self:
        """See ``GeneratorOptions.capped``: from the start."""
        return self.model_copy(update={"max_gaussians": most, "num_pts": min(self.num_pts, most)})

    @classmethod
    def of(cls, values: Mapping[str, Any], path: Path) -> Self:
        """See ``GeneratorOptions.of``. Keys without a meaning here (upstream has several) are named in one warning."""
        ignored = [key for key in values if key not in cls.model_fields]
        if ignored:
            log.warning("%s: keys without effect here: %s", path, ", ".join(ignored))
        options = super().of({key: value for key, value in values.items() if key not in ignored}, path)
        if options.lambda_sd > 0 and not options.mvdream:
            log.warning("%s: mvdream is off, but no other guidance here reads prompts; it will be used", path)
        return options
