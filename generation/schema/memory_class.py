"""Memory classes of a models file, and the choice of one by the GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

GIB = 2**30

Quantization = Literal["none", "nf4"]


class MemoryClass(BaseModel):
    """How models run on a GPU with at least ``least_gib`` of memory (2^30 bytes, as torch counts them)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1)
    least_gib: float = Field(ge=0, le=10_000)
    quantization: Quantization = "none"  # of FLUX's transformer
    quantization_t5: Quantization | None = None  # of T5; None: the same
    offload_t5: bool = False  # T5 is in pinned memory while it is idle
    offload_self_check: bool = False  # so are the self-check's CLIPs
    offload_generators: bool = False  # two generators take turns on the GPU; encoders are there while they encode
    max_batch: int = Field(ge=1, le=64)  # requests that run together


def choose(classes: Sequence[MemoryClass], memory: int | None, wanted: str | None) -> tuple[MemoryClass | None, str]:
    """The class, and why: the one named ``wanted``, else the largest that fits into ``memory`` bytes.

    None without classes or without a GPU (``memory`` is None). Raises ValueError when the wanted class does not exist,
    or none fits.
    """
    if wanted is not None:
        for each in classes:
            if each.name == wanted:
                return each, f"memory class {wanted} asked for"
        known = ", ".join(each.name for each in classes)
        raise ValueError(
            f"memory_class: {wanted!r}: " + (f"must be one of {known}" if known else "the file has no memory classes")
        )
    if not classes:
        return None, "the models file has no memory classes"
    if memory is None:
        return None, "no CUDA GPU found"
    has = f"the GPU has {memory / GIB:.2f} GiB of memory"
    for each in sorted(classes, key=lambda c: c.least_gib, reverse=True):
        if memory >= each.least_gib * GIB:
            return each, f"{has}, and {each.name} needs {each.least_gib:g}"
    raise ValueError(f"{has}, at least {min(c.least_gib for c in classes):g} are needed")
