"""The typed schema of ``configs/*.yaml``.

``GeneratorOptions`` is what the configs of all generators have in common; ``Models`` says which checkpoint each stage
and each generator loads, and how.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from generation.schema.memory_class import MemoryClass, Quantization

log = logging.getLogger("generation.schema.options")

#: keys of text_to_image that memory classes set instead
CLASS_KEYS = {"quantization", "quantization_t5", "offload_t5"}


Dtype = Literal["float32", "float16", "bfloat16"]
UnitInterval = Annotated[float, Field(ge=0, le=1)]


class SettingsError(ValueError):
    """A setting that can not be used. The message names the key, the value, the limit and where it came from."""


class Schema(BaseModel):
    """A strict, immutable model: no unknown keys, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


S = TypeVar("S", bound=Schema)


def _has_prompt(template: str) -> str:
    if template.count("{prompt}") != 1:
        raise ValueError("must contain {prompt} exactly once")
    return template


#: a prompt for a model, with {prompt} in place of the user's
Template = Annotated[str, Field(max_length=1024), AfterValidator(_has_prompt)]


class GeneratorOptions(Schema):
    """The options that all generators share. Each kind adds its own keys and defaults.

    A discriminated union: each kind narrows ``generator`` to its own name, as ``Literal["lgm"] = "lgm"``.
    """

    #: names of all checkpoints that this kind may need, beside those of the shared stages
    CHECKPOINTS: ClassVar[tuple[str, ...]] = ()

    generator: str

    @property
    def checkpoints(self) -> Mapping[str, str]:
        """The names of ``CHECKPOINTS`` that these options need (all by default) -> why, for error messages."""
        return dict.fromkeys(self.CHECKPOINTS, f"generator is {self.generator}")

    @property
    def draws(self) -> bool:
        """Whether a text becomes a picture first. If not, text to image is not loaded for it."""
        return True

    def capped(self, most: int) -> Self:
        """A copy with at most ``most`` Gaussians.

        Raises SettingsError if the kind has no such limit, or if something else contradicts it.
        """
        if "max_gaussians" not in type(self).model_fields:
            raise SettingsError(f"max_gaussians: {most}: the generator {self.generator} has no such limit")
        return validate(type(self), {**self.model_dump(), "max_gaussians": most}, f"max_gaussians: {most}")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a flat YAML. A key without a value counts as not given.

        Raises SettingsError naming the file, the key, the value and the limit.
        """
        return cls.of({key: value for key, value in read_yaml(path).items() if value is not None}, path)

    @classmethod
    def of(cls, values: Mapping[str, Any], path: Path) -> Self:
        """The options of a file's ``values``. Raises SettingsError, as ``load`` does."""
        return validate(cls, values, str(path))


class ModelChoice(Schema):
    """A checkpoint: a name of ``generation.weights.registry``, or a folder (``./``, ``../`` or ``/`` in front)."""

    model: str = Field(min_length=1)
    revision: str | None = None  # None: the registry's
    dtype: Dtype = "float32"

    @property
    def precision(self) -> str:
        """The format of the loaded weights."""
        return self.dtype


class TextToImageModel(ModelChoice):
    """The checkpoint of text to image, and how it draws."""

    image_size: int = Field(ge=64, le=2048, multiple_of=16)  # pixels
    steps: int = Field(4, ge=1, le=50)
    max_sequence_length: int = Field(256, ge=8, le=512)  # tokens for the T5 encoder
    quantization: Quantization = "none"  # of the transformer
    quantization_t5: Quantization | None = None  # of T5; None: the same
    offload_t5: bool = False  # T5 is in pinned memory while it is idle

    @property
    def t5(self) -> Quantization:
        """T5's quantization."""
        return self.quantization if self.quantization_t5 is None else self.quantization_t5

    @property
    def precision(self) -> str:
        of_transformer, of_t5 = (
            self.dtype if kind == "none" else f"{kind} and {self.dtype}" for kind in (self.quantization, self.t5)
        )
        return of_transformer if of_transformer == of_t5 else f"{of_transformer}, T5 {of_t5}"


class BackgroundModel(ModelChoice):
    """The checkpoint of background removal."""

    image_size: int = Field(ge=32, le=2048, multiple_of=32)  # pixels, the net's input


#: optional stages -> the part of the score that only they measure
_OPTIONAL = {"image_clip": "", "quality": "iqa", "lpips": "lpips"}


class Models(Schema):
    """The checkpoints of a profile, and how many requests run together at most.

    The fields are the stages that all generators share. Extra keys are checkpoints of generators, named as in their
    options' ``CHECKPOINTS``.

    The score needs ``clip``. The parts of ``image_clip`` (alignment with pictures), ``quality`` and ``lpips`` are left
    out of it if they are None.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, ModelChoice]

    max_batch: int = Field(1, ge=1, le=64)
    memory_classes: tuple[MemoryClass, ...] = ()
    text_to_image: TextToImageModel
    background: BackgroundModel
    clip: ModelChoice
    image_clip: ModelChoice | None = None
    quality: ModelChoice | None = None
    lpips: ModelChoice | None = None
    offload_self_check: bool = False  # the two CLIPs are in pinned memory while they are idle
    offload_generators: bool = False  # two generators take turns on the GPU; encoders are there while they encode

    @classmethod
    def load(cls, path: Path) -> Models:
        """Read a models file. Folders in it are relative to the file. Raises SettingsError."""
        values = read_yaml(path)
        if isinstance(stage := values.get("text_to_image"), dict) and stage.pop("prompt_template", None) is not None:
            log.warning(
                "%s: text_to_image.prompt_template has no effect here any more: it belongs into the generator's "
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
        """A copy with the values of a memory class."""
        if memory_class is None:
            return self
        fitting = {key: getattr(memory_class, key) for key in CLASS_KEYS}
        text_to_image = self.text_to_image.model_copy(update=fitting)
        return self.model_copy(
            update={
                "max_batch": memory_class.max_batch,
                "text_to_image": text_to_image,
                "offload_self_check": memory_class.offload_self_check,
                "offload_generators": memory_class.offload_generators,
            }
        )

    @property
    def optional(self) -> dict[str, ModelChoice]:
        """The chosen checkpoints of optional stages."""
        return {stage: choice for stage, choice in self.stages.items() if stage in _OPTIONAL}

    @property
    def score_parts(self) -> tuple[str, ...]:
        """The parts of the validators' score that these checkpoints can measure. SSIM needs none."""
        return (*(part for stage, part in _OPTIONAL.items() if part and stage in self.stages), "alignment", "ssim")

    @property
    def of_generators(self) -> dict[str, ModelChoice]:
        """The chosen checkpoints of generators."""
        return dict(self.__pydantic_extra__)

    def needed(self, text: GeneratorOptions, image: GeneratorOptions | None = None) -> dict[str, ModelChoice]:
        """The checkpoints that requests need: texts with options ``text``, pictures with ``image`` (None: the same).

        Raises SettingsError when one is missing in the models file.
        """
        asked = {**text.checkpoints, **(image.checkpoints if image else {})}
        for name, why in asked.items():
            if name not in self.of_generators:
                raise SettingsError(f"{why}, but the models file has no {name}")
        drawing = {"text_to_image": self.text_to_image} if text.draws else {}
        own = {name: choice for name, choice in self.of_generators.items() if name in asked}
        return {**drawing, "background": self.background, **own, "clip": self.clip}


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
    """An instance of ``schema``. Raises SettingsError naming ``source`` and each key with its value."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = []
        for each in error.errors():
            key, message = ".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {each['input']!r}: {message}" if key else message)  # of what contradicts: no key
        raise SettingsError(f"{source}: {'; '.join(problems)}") from error
