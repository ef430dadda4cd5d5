"""The service's settings, resolved from command line, config files and the machine.

The files' own schema is ``generation.schema.options``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from generation.arguments import ROOT, Arguments, checked
from generation.generators.kinds import load_models, load_options
from generation.schema.hosts import is_loopback, is_wildcard, parse_names
from generation.schema.memory_class import choose
from generation.schema.options import GeneratorOptions, ModelChoice, Models, Schema, SettingsError, UnitInterval

CONFIGS = ROOT / "configs"


class Profile(NamedTuple):
    """A profile's default files."""

    models: Path
    config: Path  # generator config for texts
    image_config: Path | None  # generator config for pictures; None: the one for texts


PROFILES = {
    "full": Profile(CONFIGS / "models_full.yaml", CONFIGS / "text_mv_fast.yaml", CONFIGS / "image_fast.yaml"),
    "tiny": Profile(CONFIGS / "models_tiny.yaml", CONFIGS / "tiny_lgm.yaml", None),
}


class Settings(Schema):
    """The resolved settings of the service."""

    profile: Literal["full", "tiny"]
    profile_reason: str
    device: str
    memory_class: str | None  # None: no GPU, or a models file without classes
    memory_reason: str
    config: Path  # of the generator for texts
    options: GeneratorOptions
    image_config: Path  # of the one for pictures
    image_options: GeneratorOptions
    models: Models
    host: str
    port: int
    validation_threshold: UnitInterval
    log_file: Path
    max_queue: int
    gpus: tuple[int, ...]  # the GPUs to use, as torch numbers them; empty on a CPU
    profile_trace: Path | None
    allowed_hosts: tuple[str, ...] = ()  # allowed in ``Host``, beside loopback's names
    #: optional stage -> why it is left out: the missing weights, and the command that fetches them
    missing: dict[str, str] = Field(default_factory=dict)
    gallery: Path = ROOT / "data" / "studio"  # folder of Studio's gallery
    miner_url: str = "http://127.0.0.1:10007"  # the miner's metrics port

    @classmethod
    def resolve(cls, values: Mapping[str, Any] | None = None, memory: int | None = None) -> Settings:
        """Resolve values of ``Arguments``, by key, as text or typed; None counts as not given.

        ``memory``: bytes of GPU memory to use; None: all. Raises SettingsError naming the key, the value and the limit,
        or the missing weights.
        """
        try:
            arguments = checked(values or {})
        except ValueError as error:
            raise SettingsError(f"arguments: {error}") from error
        if arguments.cluster:
            return cls._of_cluster(arguments)
        gpus = _choose_gpus(arguments.gpus)
        memory = memory or gpu_memory(gpus)
        profile, reason, device = _choose_profile(arguments, memory)
        if device == "cpu":
            gpus, memory = (), None
        models_file = arguments.models or PROFILES[profile].models
        models = load_models(models_file)
        try:
            memory_class, memory_reason = choose(models.memory_classes, memory, arguments.memory_class)
        except ValueError as error:
            raise SettingsError(f"{models_file}: {error}") from error
        models, absent = _without_absent(models.fitted(memory_class))
        return cls._of(
            arguments,
            models,
            profile=profile,
            profile_reason=reason,
            device=device,
            memory_class=memory_class.name if memory_class else None,
            memory_reason=memory_reason,
            gpus=gpus,
            missing=absent,
        )

    @classmethod
    def _of_cluster(cls, arguments: Arguments) -> Settings:
        """Settings of a cluster's service, which needs no GPU and no weights. Engines resolve theirs on their machines.

        The profile must be given: it may not depend on what one machine has, since all must make the same splats.
        """
        for name, given in (("gpus", arguments.gpus != "all"), ("profile_trace", arguments.profile_trace is not None)):
            if given:
                raise SettingsError(f"{name}: is for one machine, not for a cluster")
        profile: Literal["full", "tiny"] = "tiny" if arguments.profile == "tiny" else "full"
        return cls._of(
            arguments,
            load_models(arguments.models or PROFILES[profile].models),
            profile=profile,
            profile_reason=f"profile {profile} asked for"
            if arguments.profile == profile
            else "a cluster's, if not tiny",
            device="cluster",
            memory_class=None,
            memory_reason="each engine of the cluster has its own",
            gpus=(),
        )

    @classmethod
    def _of(cls, arguments: Arguments, models: Models, *, profile: Literal["full", "tiny"], **known: Any) -> Settings:
        generators = _Generators.load(profile, arguments)
        try:
            generators.needed(models)
        except SettingsError as error:
            models_file = arguments.models or PROFILES[profile].models
            raise SettingsError(f"{error} ({models_file}; profile {profile}: {known['profile_reason']})") from error
        options, image_options = generators.text, generators.image
        if (most := arguments.max_gaussians) is not None:
            options, image_options = options.capped(most), image_options.capped(most)
        if arguments.flux_steps is not None:
            steps = models.text_to_image.model_copy(update={"steps": arguments.flux_steps})
            models = models.model_copy(update={"text_to_image": steps})
        shared = {
            key: getattr(arguments, key)
            for key in (
                "host",
                "port",
                "validation_threshold",
                "log_file",
                "max_queue",
                "profile_trace",
                "gallery",
                "miner_url",
            )
        }
        return cls(
            profile=profile,
            config=generators.config,
            options=options,
            image_config=generators.image_config,
            image_options=image_options,
            models=models,
            allowed_hosts=_allowed_hosts(arguments),
            **shared,
            **known,
        )


def resolve_elsewhere(values: Mapping[str, Any], root: Path) -> Settings:
    """Resolve the service's ``values`` on another machine of its cluster, where this is called.

    ``root`` is the folder of the service's code: paths in it are taken from this machine's code folder instead. Raises
    SettingsError.
    """
    own = {key: value for key, value in values.items() if key not in ("cluster", "cluster_token_file")}
    own["profile"] = "tiny" if own.get("profile") == "tiny" else "full"
    for key in ("config", "image_config", "models"):
        if own.get(key) is not None and (path := Path(own[key]).absolute()).is_relative_to(root):
            own[key] = ROOT / path.relative_to(root)
    return Settings.resolve(own)


def _allowed_hosts(arguments: Arguments) -> tuple[str, ...]:
    """The given names, and the address that the service listens on, if it is a single one."""
    own: tuple[str, ...] = ()
    if not is_wildcard(arguments.host):
        with suppress(ValueError):  # not a host: listening on it will fail with a message
            own = parse_names(arguments.host)
    given = parse_names(arguments.allowed_hosts) if arguments.allowed_hosts else ()
    return tuple(dict.fromkeys(name for name in (*own, *given) if not is_loopback(name)))


def gpu_memory(gpus: Sequence[int]) -> int | None:
    """Bytes of the smallest of these CUDA GPUs, or None without one."""
    import torch  # seconds to import: only when a profile is really resolved

    return min((torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus), default=None)


class _Generators(NamedTuple):
    """The generator configs for texts and for pictures, and their options."""

    config: Path
    text: GeneratorOptions
    image_config: Path
    image: GeneratorOptions

    @classmethod
    def load(cls, profile: Literal["full", "tiny"], arguments: Arguments) -> _Generators:
        """The configs in the arguments, or else the profile's. Raises SettingsError."""
        config = arguments.config or PROFILES[profile].config
        image_config = arguments.image_config or PROFILES[profile].image_config or config
        return cls(config, load_options(config), image_config, load_options(image_config))

    def needed(self, models: Models) -> dict[str, ModelChoice]:
        """The checkpoints that both need.

        Raises SettingsError if one is missing in the models file, or if the config for pictures takes texts only.
        """
        if not self.image.draws:
            raise SettingsError(f"image_config: {self.image_config}: makes splats from words alone, not from pictures")
        return models.needed(self.text, self.image)


def needed_by_profile(profile: Literal["full", "tiny"]) -> dict[str, ModelChoice]:
    """The checkpoints of a profile's own files: what its default generators need, and what is optional."""
    models = load_models(PROFILES[profile].models)
    return {**_Generators.load(profile, Arguments()).needed(models), **models.optional}


def _choose_profile(arguments: Arguments, memory: int | None) -> tuple[Literal["full", "tiny"], str, str]:
    """(profile, why, device). Full only with a CUDA GPU, enough memory and all weights."""
    import torch  # seconds to import: only when a profile is really resolved

    from generation.splats.rasterize import gsplat_build
    from generation.weights import missing

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.profile == "full" and device == "cpu":
        raise SettingsError(
            "profile: full needs a CUDA GPU, and torch finds none: nvidia-smi tells whether there is one, and whether "
            "its driver is 580 or newer"
        )

    def tiny(why: str) -> tuple[Literal["tiny"], str, str]:
        if device == "cpu" or gsplat_build.is_built():
            return "tiny", why, device
        return "tiny", f"{why}; on the CPU, for gsplat is not built for the GPU", "cpu"

    if arguments.models is not None:
        why = f"models file {arguments.models} given"
        return ("full", why, device) if arguments.profile == "full" else tiny(why)
    if arguments.profile == "tiny":
        return tiny("profile tiny asked for")
    models = load_models(PROFILES["full"].models)
    absent = missing(_Generators.load("full", arguments).needed(models).values())
    if arguments.profile == "full":
        if absent:
            raise SettingsError(f"profile: full needs weights that are not on this machine: {'; '.join(absent)}")
        return "full", "profile full asked for", device
    if device == "cpu":
        return "tiny", "no CUDA GPU found, so the embedded tiny models run on the CPU", device
    if absent:
        return tiny(f"a CUDA GPU is there, but not the full-size weights: {'; '.join(absent)}")
    try:
        choose(models.memory_classes, memory, arguments.memory_class)
    except ValueError as error:
        return tiny(f"all full-size weights are there, but {error}")
    return "full", "a CUDA GPU and all full-size weights are there", device


def _without_absent(models: Models) -> tuple[Models, dict[str, str]]:
    """The models without optional ones that are not on this machine, and why each is left out.

    Raises SettingsError for one that exists but is damaged.
    """
    from generation.weights import MissingWeights, WeightsError, local_folder, lookup

    absent = {}
    for stage, choice in models.optional.items():
        try:
            local_folder(lookup(choice))
        except MissingWeights as error:
            absent[stage] = str(error)
        except WeightsError as error:
            raise SettingsError(f"{stage}: {error}") from error
    return models.model_copy(update=dict.fromkeys(absent)), absent


def _choose_gpus(asked: str) -> tuple[int, ...]:
    """The GPUs to use, as torch numbers them. Raises SettingsError if one does not exist."""
    import torch

    # With a driver that is too old, torch counts the cards but cannot use them.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "all":
        return tuple(range(count))
    numbers = tuple(int(number) for number in asked.split(","))
    if len(set(numbers)) < len(numbers):
        raise SettingsError(f"gpus: {asked!r}: names a GPU twice")
    if max(numbers) >= count:
        there = f"CUDA finds {count}, numbered from 0" if count else "CUDA finds no GPU on this machine (nvidia-smi?)"
        raise SettingsError(f"gpus: {asked!r}: {there}")
    return numbers
