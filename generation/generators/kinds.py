"""The table of all generators: the only place that lists them. No torch."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.lgm.options import LgmOptions
from generation.generators.trellis.options import TrellisOptions
from generation.schema.options import GeneratorOptions, Models, SettingsError, read_yaml

if TYPE_CHECKING:
    from generation.generators.base import Generator, Parts


class Kind(NamedTuple):
    """A kind of generator. ``load`` is "module:function", called as function(options, parts); it gives a ``Generator``.

    It is a name, because importing the module would import torch, which takes seconds.
    """

    options: type[GeneratorOptions]
    load: str


#: ``generator`` of a config -> the kind
KINDS = {
    "dreamgaussian": Kind(DreamGaussianOptions, "generation.generators.dreamgaussian.optimiser:load"),
    "lgm": Kind(LgmOptions, "generation.generators.lgm.generator:load"),
    "trellis": Kind(TrellisOptions, "generation.generators.trellis.generator:load"),
}
#: the kind of a config without ``generator``, such as those of upstream's DreamGaussian
DEFAULT = "dreamgaussian"


def load_options(path: Path) -> GeneratorOptions:
    """Options from a generator's config. Raises SettingsError naming the file, the key, the value and the limit."""
    name = read_yaml(path).get("generator") or DEFAULT
    if not isinstance(name, str) or name not in KINDS:
        raise SettingsError(f"{path}: generator: {name!r}: must be one of {', '.join(KINDS)}")
    return KINDS[name].options.load(path)


def load_models(path: Path) -> Models:
    """Read a models file. Raises SettingsError, also for a checkpoint that no stage and no generator has."""
    models = Models.load(path)
    known = {name for kind in KINDS.values() for name in kind.options.CHECKPOINTS}
    for name in models.of_generators:
        if name not in known:
            raise SettingsError(f"{path}: {name}: no stage, and no generator's checkpoint: {', '.join(sorted(known))}")
    return models


def load(options: GeneratorOptions, parts: Parts) -> Generator:
    """Build the generator of ``options`` from ``parts``. Raises WeightsError."""
    generator: Generator = pkgutil.resolve_name(KINDS[options.generator].load)(options, parts)
    return generator
