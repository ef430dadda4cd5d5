"""Small networks of TRELLIS and DINOv2 with random weights, and inputs for them.

Every tensor is drawn, norms and gammas included. As the authors' code initialises them, several outputs are zero.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from generation.generators.base import Subject
from generation.generators.trellis.gaussian_decoder import GaussianDecoder
from generation.generators.trellis.generator import Trellis
from generation.generators.trellis.layers import position_embedding
from generation.generators.trellis.options import TrellisOptions
from generation.generators.trellis.sampler import schedule
from generation.generators.trellis.slat_flow import SlatFlow
from generation.generators.trellis.sparse import Voxels
from generation.generators.trellis.structure_decoder import StructureDecoder
from generation.generators.trellis.structure_flow import StructureFlow
from generation.generators.trellis.weights import Networks, load_network
from generation.splats.gaussians import Gaussians
from scripts.tools.golden_weights import weights

STRUCTURE_FLOW = {
    "resolution": 4, "in_channels": 4, "out_channels": 4, "model_channels": 32, "cond_channels": 24, "num_blocks": 2,
    "num_heads": 4, "mlp_ratio": 4, "patch_size": 1, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": False,
}  # fmt: skip

STRUCTURE_DECODER = {
    "out_channels": 1, "latent_channels": 4, "num_res_blocks": 2, "num_res_blocks_middle": 2, "channels": [32, 16, 8],
    "use_fp16": False,
}  # fmt: skip

SLAT_FLOW = {
    "resolution": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "cond_channels": 24, "num_blocks": 2,
    "num_heads": 4, "mlp_ratio": 4, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [16],
    "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": False,
}  # fmt: skip

GAUSSIANS: dict[str, Any] = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 4, "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4, "scaling_bias": 4e-3, "opacity_bias": 0.1, "scaling_activation": "softplus",
}  # fmt: skip

GAUSSIAN_DECODER: dict[str, Any] = {
    "resolution": 16, "model_channels": 24, "latent_channels": 4, "num_blocks": 3, "num_heads": 3, "mlp_ratio": 4,
    "attn_mode": "swin", "window_size": 8, "use_fp16": False, "representation_config": GAUSSIANS,
}  # fmt: skip

DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
          "num_register_tokens": 4}  # fmt: skip

#: what a quiet trunk has a thousandth of
QUIET = {
    "structure_flow": ("input_layer", "pos_emb", "to_out", "mlp.mlp.2"),
    "structure_decoder": ("input_layer", "conv1", "conv2", "blocks.2.conv", "blocks.5.conv"),
    "slat_flow": ("input_layer", "conv1", "conv2", "skip_connection", "to_out", "mlp.mlp.2"),
    "gaussian_decoder": ("input_layer", "to_out", "mlp.mlp.2"),
    "condition": ("embeddings", "layer_scale"),
}

#: steps and guidance of the authors' demonstration and of their pipeline's defaults
SAMPLED = ((12, 7.5), (25, 5.0))

INTERVAL, RESCALE = (0.5, 1.0), 3.0

#: of a whole run; nothing of one flow is as in the other, and no guidance interval is the default
WHOLE: dict[str, Any] = {
    "structure_steps": 4, "structure_guidance": 2.0, "structure_interval": (0.6, 1.0), "structure_rescale": 2.0,
    "slat_steps": 5, "slat_guidance": 1.0, "slat_interval": (0.3, 0.9), "slat_rescale": 3.0,
}  # fmt: skip
NORMALISATION = {"mean": [-0.4, 0.1, 0.3, -0.2], "std": [1.5, 0.7, 1.2, 0.9]}
SEED = 4
#: added to the logits of a structure, so that few voxels are left; none is nearer to 0 than 0.0025 then
FEW = -0.5

#: network, config and golden file of each part, under the names that ``pipeline.json`` has for them
PARTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "sparse_structure_flow_model": (StructureFlow, STRUCTURE_FLOW, "structure_flow"),
    "sparse_structure_decoder": (StructureDecoder, STRUCTURE_DECODER, "structure_decoder"),
    "slat_flow_model": (SlatFlow, SLAT_FLOW, "slat_flow"),
    "slat_decoder_gs": (GaussianDecoder, GAUSSIAN_DECODER, "gaussian_decoder"),
}


def quiet(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same weights with a trunk a thousandth as large.

    The Gaussian decoder always adds positions to it: there they are taken away again from the first voxel.
    """
    quieter = {
        key: tensor / 1000 if any(part in key for part in QUIET[name]) else tensor for key, tensor in state.items()
    }
    if name == "gaussian_decoder":
        (position,) = position_embedding(decoded_cells()[0][:1], GAUSSIAN_DECODER["model_channels"])
        quieter["input_layer.bias"] = quieter["input_layer.bias"] - position
    return quieter


def decoded_cells() -> list[Tensor]:
    """What the Gaussian decoder is given."""
    return sparse_coords(5, 16, (0.02, 0.01))


def sparse_coords(seed: int, side: int, shares: tuple[float, ...]) -> list[Tensor]:
    """Voxels (N, 3) of one sample for each share of the cube, in the order of ``argwhere``."""
    numbers = weights({"cells": [len(shares), side, side, side]}, seed)["cells"]
    spread = numbers * float(side) ** 1.5  # standard normal again
    return [
        torch.argwhere(cells > torch.special.ndtri(torch.tensor(1 - share)))
        for cells, share in zip(spread, shares, strict=True)
    ]


def ours(kind: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Our network from the authors' own kind of files."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "network"
        path.with_suffix(".json").write_text(json.dumps({"name": "any", "args": config}))
        save_file(state, path.with_suffix(".safetensors"))
        return load_network(kind, path, "cpu", torch.float32)


def sample(
    flow: Any, noise: Tensor, features: Tensor, steps: int, guidance: float, voxels: Voxels | None = None
) -> Tensor:  # fmt: skip
    """A flow from noise to its end for one picture's features (1, S, C)."""
    context, x = flow.project_context(features[0]), noise
    for step in schedule(steps, RESCALE, INTERVAL):
        t = torch.tensor([1000 * step.t])
        if voxels is None:
            v = flow(x, t, [context], guided=int(step.guided))
        else:
            v = flow(x, t, [context], voxels, Voxels.join([voxels] * (1 + step.guided)))
        conditional, unconditional = v.chunk(2) if step.guided else (v, None)
        x = step.apply(x, conditional, unconditional, guidance)
    return x


def sparse_structure(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The structure decoder's weights, so that it leaves few voxels."""
    return {**state, "out_layer.2.bias": state["out_layer.2.bias"] + FEW}


class Seen(nn.Module):
    """In place of DINOv2: the same features (1, S, C) for every cut-out."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.size, self.features = 56, features

    def forward(self, cutouts: Tensor) -> Tensor:
        return self.features.expand(len(cutouts), -1, -1)


def whole_run(states: dict[str, dict[str, Tensor]], features: Tensor) -> Gaussians:
    """Our generator from a picture's features to Gaussians before they are sharpened, with the weights of each of
    ``PARTS``."""
    flow, decoder, slat_flow, gaussian_decoder = (
        ours(kind, config, states[name]) for name, (kind, config, _) in PARTS.items()
    )
    mean, std = (torch.tensor(NORMALISATION[key]) for key in ("mean", "std"))
    networks = Networks(flow, decoder, slat_flow, gaussian_decoder, mean, std)
    condition: Any = Seen(features)
    generator = Trellis(networks, condition, TrellisOptions(**WHOLE), "cpu")
    work = generator.begin(Subject("", torch.zeros(4, 56, 56), SEED))
    with patch("generation.generators.trellis.generator.sharpened", lambda gaussians: gaussians):
        while not work.done:
            generator.tick([work])
    return work.gaussians()


def ply_fields(gaussians: Gaussians) -> dict[str, Tensor]:
    """What a PLY has. Rotations are matrices, for a quaternion has two signs."""
    return {
        "means": gaussians.means,
        "colours": gaussians.sh[:, 0],
        "opacities": gaussians.logit_opacities,
        "scales": gaussians.log_scales,
        "rotations": gaussians.rotations(),
    }


def cutouts() -> Tensor:
    """(2, 4, 56, 56) in 0..1, of no meaning."""
    return weights({"picture": [2, 4, 56, 56]}, seed=10)["picture"].mul(100).sigmoid()


def dinov2_names() -> dict[str, list[int]]:
    """Names and shapes of a small DINOv2 with registers in the hub's layout, as the public file has them."""
    width, side = 32, 4
    names = {
        "embeddings.cls_token": [1, 1, width], "embeddings.mask_token": [1, width],
        "embeddings.register_tokens": [1, 4, width], "embeddings.position_embeddings": [1, side * side + 1, width],
        "embeddings.patch_embeddings.projection.weight": [width, 3, 14, 14],
        "embeddings.patch_embeddings.projection.bias": [width], "layernorm.weight": [width], "layernorm.bias": [width],
    }  # fmt: skip
    for i in range(2):
        block = f"encoder.layer.{i}."
        for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value",
                     "attention.output.dense"):  # fmt: skip
            names |= {f"{block}{part}.weight": [width, width], f"{block}{part}.bias": [width]}
        for part in ("norm1", "norm2"):
            names |= {f"{block}{part}.weight": [width], f"{block}{part}.bias": [width]}
        names |= {f"{block}layer_scale{n}.lambda1": [width] for n in (1, 2)}
        names |= {f"{block}mlp.fc1.weight": [4 * width, width], f"{block}mlp.fc1.bias": [4 * width]}
        names |= {f"{block}mlp.fc2.weight": [width, 4 * width], f"{block}mlp.fc2.bias": [width]}
    return names


def to_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hub's names to those of DINOv2's authors."""
    words = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.position_embeddings": "pos_embed",
        "embeddings.": "", "encoder.layer.": "blocks.", "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "layernorm.": "norm.",
    }  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for old, new in words.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    for name in [name for name in renamed if "attention.attention.query" in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return renamed


def dinov2_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    """A checkpoint in the hub's layout."""
    config = {**DINOV2, "model_type": "dinov2_with_registers", "architectures": ["Dinov2WithRegistersModel"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder
