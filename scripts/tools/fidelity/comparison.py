"""What the comparisons share: imports from checkouts, and the collected differences."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.tools.golden_weights import GOLDEN, pack

LIMIT = 1e-4  # largest absolute difference, float32


@contextmanager
def borrowed(folder: Path, *stand_ins: str) -> Iterator[None]:
    """Imports come from ``folder`` first; what was imported inside, and the stand-ins, are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    for name in stand_ins:
        sys.modules[name] = MagicMock(name=name)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None) or ""
            if name in stand_ins or origin.startswith(str(folder)):
                del sys.modules[name]


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


class Comparison:
    """Collects differences and golden tensors. ``authors`` is the folder of the checkouts."""

    def __init__(self, authors: Path, write: bool) -> None:
        self.authors, self.write = authors, write
        #: what, largest difference, largest value, and the standard deviation of what the authors' code gave: if that
        #: is 0, any code gives the same
        self.rows: list[tuple[str, float, float, float | None]] = []

    def add(self, what: str, theirs: Tensor, ours: Tensor) -> None:
        """Compare two results of the same shape."""
        assert theirs.shape == ours.shape, (what, theirs.shape, ours.shape)
        difference = float((theirs.double() - ours.double()).abs().max())
        spread = float(theirs.std()) if theirs.numel() > 1 else None
        self.rows.append((what, difference, float(theirs.abs().max()), spread))

    def count(self, what: str, differing: int, of: float) -> None:
        """Note how many of something differ."""
        self.rows.append((what, float(differing), of, None))

    def golden(self, name: str, tensors: dict[str, Tensor], **about: object) -> None:
        """Write tensors to tests/golden, if asked to."""
        if self.write:
            GOLDEN.mkdir(exist_ok=True)
            tensors = {key: tensor.detach().float().contiguous() for key, tensor in tensors.items()}
            path = GOLDEN / f"{name}.safetensors"
            save_file(tensors, path, {key: pack(value) for key, value in about.items()})
