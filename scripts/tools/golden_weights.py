"""Random weights that are the same everywhere, so that a golden file holds names and shapes in place of tensors."""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def weights(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, Tensor]:
    """A tensor for each name: normalisations near one, biases small, the rest scaled by what flows in.

    From numpy's legacy generator, whose stream does not change between versions.
    """
    random = np.random.RandomState(seed)
    filled = {}
    for name in sorted(shapes):
        shape = shapes[name]
        values = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        if len(shape) > 1:
            filled[name] = values / float(np.prod(shape[1:])) ** 0.5
        else:
            filled[name] = 0.1 * values + float(name.endswith("weight"))
    return filled


def lgm_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """As `weights`; opacities spread so far that some Gaussians are dropped."""
    state = weights(shapes, seed=9)
    state["conv.weight"][3] *= 8
    return state


def lgm_views() -> Tensor:
    """Two objects' four views (2, 4, 3, 40, 40), in 0..1."""
    return weights({"views": [2, 4, 3, 40, 40]}, seed=8)["views"].mul(100).sigmoid()


def pack(value: object) -> str:
    """As text for a golden file's metadata: a UNet's names are long and much alike."""
    return b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 9)).decode()


def unpack(text: str) -> Any:
    return json.loads(zlib.decompress(b64decode(text)))


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a golden file, and what its metadata says."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        about = {key: unpack(text) for key, text in file.metadata().items()}
    return load_file(path), about
