"""TRELLIS's networks from a folder in the layout of ``microsoft/TRELLIS-image-large``.

``pipeline.json`` names a config and a safetensors file for each network, and has the latents' mean and deviation.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from generation.generators.trellis.gaussian_decoder import GaussianDecoder
from generation.generators.trellis.slat_flow import SlatFlow
from generation.generators.trellis.sparse import Kernel
from generation.generators.trellis.structure_decoder import StructureDecoder
from generation.generators.trellis.structure_flow import StructureFlow
from generation.weights.registry import WeightsError

N = TypeVar("N", StructureFlow, StructureDecoder, SlatFlow, GaussianDecoder)

#: Options of the authors' classes that are ignored, as the service chooses the precision; and those of which one value
#: is supported, the published models'.
_SILENT = {"use_fp16", "use_checkpoint", "num_head_channels"}
_ONLY: dict[str, dict[str, Any]] = {
    "StructureFlow": {"patch_size": 1, "pe_mode": "ape", "share_mod": False, "qk_rms_norm_cross": False},
    "StructureDecoder": {"norm_type": "layer"},
    "SlatFlow": {
        "patch_size": 2, "pe_mode": "ape", "share_mod": False, "qk_rms_norm_cross": False, "use_skip_connection": True,
    },
    "GaussianDecoder": {"attn_mode": "swin", "pe_mode": "ape"},
}  # fmt: skip
_GAUSSIANS = {"scaling_activation": "softplus"}


@dataclass(frozen=True)
class Networks:
    """What ``pipeline.json`` puts together."""

    structure_flow: StructureFlow
    structure_decoder: StructureDecoder
    slat_flow: SlatFlow
    gaussian_decoder: GaussianDecoder
    mean: Tensor  # (C,) of structured latents
    std: Tensor

    @classmethod
    def load(cls, folder: Path, device: str, dtype: torch.dtype) -> Networks:
        """``dtype`` is of the blocks; norms and first and last layers are in float32.

        Raises WeightsError naming the file when one is missing or not exactly what its config says.
        """
        path = folder / "pipeline.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))["args"]
            names = {key: str(name) for key, name in about["models"].items()}
            mean, std = (torch.tensor(about["slat_normalization"][key], device=device) for key in ("mean", "std"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightsError(f"{path}: not a TRELLIS pipeline: {error!r}") from error
        kinds: dict[str, Any] = {
            "sparse_structure_flow_model": StructureFlow,
            "sparse_structure_decoder": StructureDecoder,
            "slat_flow_model": SlatFlow,
            "slat_decoder_gs": GaussianDecoder,
        }
        if lacking := sorted(set(kinds) - set(names)):
            raise WeightsError(f"{path}: names no {', '.join(lacking)}")
        loaded: list[Any] = [load_network(kind, folder / names[key], device, dtype) for key, kind in kinds.items()]
        flow, decoder, slat_flow, gaussian_decoder = loaded
        networks = cls(flow, decoder, slat_flow, gaussian_decoder, mean, std)
        channels = {
            networks.slat_flow.channels,
            networks.gaussian_decoder.input_layer.in_features,
            *mean.shape,
            *std.shape,
        }
        if len(channels) > 1 or networks.slat_flow.resolution != networks.gaussian_decoder.resolution:
            raise WeightsError(f"{path}: its networks and its normalisation are not of one size")
        return networks


def load_network(kind: type[N], path: Path, device: str, dtype: torch.dtype) -> N:
    """A network from ``PATH.json`` and ``PATH.safetensors``. Raises WeightsError naming what is wrong."""
    try:
        arguments = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))["args"]
        with torch.device("meta"):
            network = build(kind, arguments)
        state = load_file(path.with_name(path.name + ".safetensors"), device=device)
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"{path}: not a usable {kind.__name__}: {' '.join(str(error).split())}") from error
    return prepare(network, dtype)


def build(kind: type[N], arguments: Mapping[str, Any]) -> N:
    """A network of an authors' config, with random weights. Raises ValueError for options that it can not have."""
    known = dict(arguments)
    for name, value in _ONLY[kind.__name__].items():
        if known.pop(name, value) != value:
            raise ValueError(f"{name} {arguments[name]!r} is not supported, only {value!r}")
    for name, value in _GAUSSIANS.items() if kind is GaussianDecoder else ():
        if known["representation_config"][name] != value:
            raise ValueError(f"{name} {known['representation_config'][name]!r} is not supported, only {value!r}")
    if len(known.get("io_block_channels", [0])) != 1:
        raise ValueError(f"io_block_channels {known['io_block_channels']} must be one number")
    names = set(inspect.signature(kind).parameters)
    if unknown := sorted(set(known) - names - _SILENT):
        raise ValueError(f"unknown: {', '.join(unknown)}")
    return kind(**{name: value for name, value in known.items() if name in names})


def prepare(network: N, dtype: torch.dtype) -> N:
    """For use, with the linear layers and convolutions of its blocks in ``dtype``."""
    for part in network.torso:
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv3d | Kernel):
                module.to(dtype)
    return network.eval().requires_grad_(False)
