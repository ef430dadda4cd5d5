"""Loads UNets that are published with latent-diffusion's parameter names into diffusers' class.

MVDream's ``unet`` folder has diffusers' layout on the outside, but its config and its weights are those of the authors'
class, which descends from latent-diffusion's (Rombach et al., 2022). The architecture is the same as that of diffusers'
``UNet2DConditionModel``; names and the way of counting blocks differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from generation.weights.registry import WeightsError
from generation.weights.strict import load_model, read_weights

# Latent-diffusion's names and diffusers', outside of the blocks and within a residual block; first ones win.
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "camera_embed.0": "class_embedding.linear_1",
    "camera_embed.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet of a folder in either naming. Raises WeightsError when its weights are not exactly the config's."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "model_channels" not in config:
            return load_model(UNet2DConditionModel, folder, dtype)
        with torch.device("meta"):
            unet = UNet2DConditionModel(**unet_config(config))
        state = rename_unet(read_weights(folder), config["num_res_blocks"])
        unet.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{folder}: not a usable UNet: {' '.join(str(error).split())}") from error
    return unet


def unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``UNet2DConditionModel`` for a config with latent-diffusion's keys.

    Attention heads are given by ``num_head_channels`` (their width) or ``num_heads``. With ``camera_dim``, the camera's
    embedding takes the place of diffusers' class embedding: linear, SiLU, linear, added to the time's.
    """
    widths = [config["model_channels"] * factor for factor in config["channel_mult"]]
    attends = [2**level in config["attention_resolutions"] for level in range(len(widths))]
    by_width = config.get("num_head_channels", -1) not in (None, -1)
    heads = [width // config["num_head_channels"] if by_width else config["num_heads"] for width in widths]
    arguments = {
        "sample_size": config["image_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "layers_per_block": config["num_res_blocks"],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "transformer_layers_per_block": config.get("transformer_depth", 1),
        "cross_attention_dim": config["context_dim"],
        "use_linear_projection": config.get("use_linear_in_transformer", True),
    }
    if config.get("camera_dim"):
        arguments |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": config["camera_dim"]}
    return arguments


def rename_unet(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights under diffusers' names; ``layers`` residual blocks a level. Raises ValueError for a name that has none.

    Latent-diffusion counts through all levels: ``input_blocks.N.K`` and ``output_blocks.N.K``, where K is 0 for the
    residual block, then the attention and the change of size, whichever there are.
    """
    return {_rename(name, layers): tensor for name, tensor in state.items()}


def _rename(name: str, layers: int) -> str:
    for old, new in _OUTSIDE.items():
        if name.startswith(f"{old}."):
            return _rename_residual(new + name[len(old) :])
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    if match is None:
        raise ValueError(f"{name!r} is no name of a latent-diffusion UNet")
    half, number, part, rest = match[1], int(match[2]), match[3], match[4]
    level, layer = divmod(number - 1 if half == "input" else number, layers + 1)
    blocks = f"{'down' if half == 'input' else 'up'}_blocks.{level}"
    if half == "input" and layer == layers:
        return f"{blocks}.downsamplers.0.{rest.replace('op.', 'conv.')}"
    if rest.startswith("conv."):
        return f"{blocks}.upsamplers.0.{rest}"
    kind = "resnets" if part == "0" else "attentions"
    return _rename_residual(f"{blocks}.{kind}.{layer}.{rest}")


def _rename_residual(name: str) -> str:
    for old, new in _RESIDUAL.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name
