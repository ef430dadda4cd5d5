"""The typed schema of ``configs/*.yaml``.

``DreamGaussianOptions`` is an optimisation config with DreamGaussian's own flat keys; ``Models`` says which checkpoint
each stage loads and how.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from generation.schema.limits import MAX_GAUSSIANS
from generation.schema.memory_class import MemoryClass, Quantization, RestingPlace

log = logging.getLogger("generation.schema.options")

#: What memory classes say in place of the text_to_image stage.
CLASS_KEYS = {"quantization", "t5_rests_on"}

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

Dtype = Literal["float32", "float16", "bfloat16"]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
Colour = tuple[UnitInterval, UnitInterval, UnitInterval]
Weight = Annotated[float, Field(ge=0, le=1e6)]
LearningRate = Annotated[float, Field(ge=0, le=1)]
Iteration = Annotated[int, Field(ge=0, le=1_000_000)]
Interval = Annotated[int, Field(ge=1, le=1_000_000)]


class SettingsError(ValueError):
    """A setting that can not be used. The message names the key, the value, the limit and where it came from."""


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


S = TypeVar("S", bound=Schema)


class DreamGaussianOptions(Schema):
    """Options of one optimisation (Tang et al., 2023, arXiv:2309.16653), under the names that upstream's YAMLs use.

    The defaults are those of upstream's ``text_mv.yaml``.
    """

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
    prompt_template: str = Field(
        "{prompt}, a single object, whole, centered, {view}, plain white background", max_length=1024
    )  # of text to image
    mvdream_template: str = Field("{prompt}, 3d asset", max_length=1024)
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

    @field_validator("prompt_template", "mvdream_template")
    @classmethod
    def _has_prompt(cls, template: str) -> str:
        if template.count("{prompt}") != 1:
            raise ValueError("must contain {prompt} exactly once")
        return template

    @model_validator(mode="after")
    def _agrees(self) -> DreamGaussianOptions:
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

    def text_to_image_prompt(self, prompt: str) -> str:
        """What text to image is asked for: a picture as the reference view's camera sees the object."""
        view = next(words for least, words in VIEWS if -self.elevation >= least)
        return self.prompt_template.replace("{view}", view).replace("{prompt}", prompt)

    def mvdream_prompt(self, prompt: str) -> str:
        """What MVDream is asked for; nothing where there are no words."""
        return self.mvdream_template.replace("{prompt}", prompt) if prompt else ""

    @classmethod
    def load(cls, path: Path) -> DreamGaussianOptions:
        """Read a YAML of flat keys. Keys without a meaning here (upstream has several) are named in one warning.

        A key without a value counts as left out, as upstream has it.

        Raises SettingsError naming the file, the key, the value and the limit.
        """
        values = read_yaml(path)
        ignored = [key for key in values if key not in cls.model_fields]
        known = {key: value for key, value in values.items() if key not in ignored and value is not None}
        if ignored:
            log.warning("%s: keys without effect here: %s", path, ", ".join(map(str, ignored)))
        options = validate(cls, known, str(path))
        if options.lambda_sd > 0 and not options.mvdream:
            log.warning("%s: mvdream is off, but no other guidance here reads prompts; it will be used", path)
        return options


class ModelChoice(Schema):
    """A checkpoint: a name of ``generation.weights.registry``, or a folder (``./``, ``../`` or ``/`` in front)."""

    model: str = Field(min_length=1)
    revision: str | None = None  # None: the registry's
    dtype: Dtype = "float32"

    @property
    def precision(self) -> str:
        """What the weights are kept in."""
        return self.dtype


class TextToImageModel(ModelChoice):
    image_size: int = Field(ge=64, le=2048, multiple_of=16)  # pixels
    steps: int = Field(4, ge=1, le=50)
    max_sequence_length: int = Field(256, ge=8, le=512)  # tokens for the T5 encoder
    quantization: Quantization = "none"  # of the transformer and T5
    t5_rests_on: RestingPlace = "gpu"  # where T5 is while it encodes nothing

    @property
    def precision(self) -> str:
        return self.dtype if self.quantization == "none" else f"{self.quantization} and {self.dtype}"


class BackgroundModel(ModelChoice):
    image_size: int = Field(ge=32, le=2048, multiple_of=32)  # pixels, the net's input


#: stages that a profile works without, with the part of the score that each measures alone
_OPTIONAL = {"image_clip": "", "quality": "iqa", "lpips": "lpips"}


class Models(Schema):
    """The checkpoints of a profile, one for each stage, and how many requests are worth running together.

    Of the validators' score ``clip`` is the part that must be there; what ``image_clip`` (alignment of pictures),
    ``quality`` and ``lpips`` have no weights for is left out.
    """

    max_batch: int = Field(1, ge=1, le=64)
    memory_classes: tuple[MemoryClass, ...] = ()
    text_to_image: TextToImageModel
    background: BackgroundModel
    mvdream: ModelChoice
    zero123: ModelChoice | None = None
    stable_zero123: ModelChoice | None = None
    clip: ModelChoice
    image_clip: ModelChoice | None = None
    quality: ModelChoice | None = None
    lpips: ModelChoice | None = None
    self_check_rests_on: RestingPlace = "gpu"  # where the two CLIPs are while they look at nothing

    @classmethod
    def load(cls, path: Path) -> Models:
        """Read a models file. Folders in it are relative to the file. Raises SettingsError."""
        values = read_yaml(path)
        if isinstance(stage := values.get("text_to_image"), dict) and stage.pop("prompt_template", None) is not None:
            log.warning(
                "%s: text_to_image.prompt_template has no effect here any more: it belongs into the optimisation "
                "config (prompt_template), where the elevation is that it must agree with", path,
            )  # fmt: skip
        models = validate(cls, values, str(path))
        if models.memory_classes:
            said = [f"text_to_image.{key}" for key in sorted(models.text_to_image.model_fields_set & CLASS_KEYS)]
            said += ["max_batch"] if "max_batch" in models.model_fields_set else []
            if said:
                raise SettingsError(f"{path}: {', '.join(said)}: memory_classes say that, for each class")
        absolute = {
            stage: choice.model_copy(update={"model": str((path.parent / choice.model).resolve())})
            for stage, choice in models.stages.items()
            if choice.model.startswith((".", "/"))
        }
        return models.model_copy(update=absolute)

    @property
    def stages(self) -> dict[str, ModelChoice]:
        """The chosen checkpoint of each stage, by the stage's name."""
        return {stage: choice for stage, choice in self if isinstance(choice, ModelChoice)}

    def fitted(self, memory_class: MemoryClass | None) -> Models:
        """The same with what a memory class says."""
        if memory_class is None:
            return self
        fitting = {"quantization": memory_class.quantization, "t5_rests_on": memory_class.t5_rests_on}
        text_to_image = self.text_to_image.model_copy(update=fitting)
        return self.model_copy(
            update={
                "max_batch": memory_class.max_batch,
                "text_to_image": text_to_image,
                "self_check_rests_on": memory_class.self_check_rests_on,
            }
        )

    @property
    def optional(self) -> dict[str, ModelChoice]:
        """The chosen checkpoints that a profile works without."""
        return {stage: choice for stage, choice in self.stages.items() if stage in _OPTIONAL}

    @property
    def score_parts(self) -> tuple[str, ...]:
        """The parts of the validators' score that these checkpoints measure; SSIM needs none."""
        return (*(part for stage, part in _OPTIONAL.items() if part and stage in self.stages), "alignment", "ssim")

    def needed(self, options: DreamGaussianOptions) -> dict[str, ModelChoice]:
        """The stages that requests can not do without under these options.

        Raises SettingsError when one has no checkpoint.
        """
        zero123 = "stable_zero123" if options.stable_zero123 else "zero123"
        unused = {"zero123", "stable_zero123", *_OPTIONAL}
        if options.lambda_zero123 > 0:
            unused.remove(zero123)
            if getattr(self, zero123) is None:
                raise SettingsError(f"lambda_zero123 is {options.lambda_zero123}, but the models file has no {zero123}")
        if options.lambda_sd == 0 and options.init != "views":
            unused.add("mvdream")
        return {stage: choice for stage, choice in self.stages.items() if stage not in unused}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, interpolations left as they are. Raises SettingsError naming the file."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: can not be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold keys with values, not a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def validate(schema: type[S], values: Mapping[str, Any], source: str) -> S:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = []
        for each in error.errors():
            key = ".".join(map(str, each["loc"])) or "file"
            problems.append(f"{key}: {each['input']!r}: {each['msg']}")
        raise SettingsError(f"{source}: {'; '.join(problems)}") from error
