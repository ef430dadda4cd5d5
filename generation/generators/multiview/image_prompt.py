"""ImageDream's UNet (Wang and Shi 2023, https://arxiv.org/abs/2312.02201), as it is published, in diffusers' classes.

It is MVDream's UNet with IP-Adapter (Ye et al. 2023, https://arxiv.org/abs/2308.06721): a resampler turns CLIP features
of a picture into a few tokens, and each cross attention has keys and values for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor, nn

from generation.weights import WeightsError
from generation.weights.latent_diffusion import rename_unet, unet_config
from generation.weights.strict import read_weights

# The resampler's form is in no config.
SEEN_WIDTH, DEPTH, HEADS, HEAD_WIDTH = 1280, 4, 12, 64
_RESAMPLER = "image_embed."
# Within a layer: the authors' names and diffusers'.
_OF_LAYER = {
    "0.norm1": "ln0",
    "0.norm2": "ln1",
    "0.to_q": "attn.to_q",
    "0.to_out": "attn.to_out.0",
    "1.0": "ff.0",
    "1.1": "ff.1.net.0.proj",
    "1.3": "ff.1.net.2",
}


def load_image_prompt_unet(
    folder: Path, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, IPAdapterPlusImageProjection]:
    """The UNet and the resampler of a folder with the authors' config and names.

    Raises WeightsError when its weights are not exactly the config's.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not config.get("ip_dim") or config.get("ip_weight", 1.0) != 1.0:
            raise ValueError("it is to be told of a picture by tokens: ip_dim must be over 0, and ip_weight 1")
        with torch.device("meta"):
            unet, resampler = build(config)
        state = {name: tensor.to(dtype) for name, tensor in read_weights(folder).items()}
        of_unet, of_resampler = rename(state, config["num_res_blocks"])
        unet.load_state_dict(of_unet, strict=True, assign=True)
        resampler.load_state_dict(of_resampler, strict=True, assign=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{folder}: not a usable UNet: {' '.join(str(error).split())}") from error
    return unet, resampler


def build(config: Mapping) -> tuple[UNet2DConditionModel, IPAdapterPlusImageProjection]:
    """Both for a config with latent-diffusion's keys, with random weights."""
    unet = UNet2DConditionModel(**unet_config(config))
    for layer in unet.modules():
        if isinstance(layer, Attention) and layer.is_cross_attention:
            for name in ("to_k_ip", "to_v_ip"):
                layer.add_module(name, nn.Linear(config["context_dim"], layer.inner_kv_dim, bias=False))
    width = config["context_dim"]
    return unet, IPAdapterPlusImageProjection(SEEN_WIDTH, width, width, DEPTH, HEAD_WIDTH, HEADS, config["ip_dim"])


def rename(state: Mapping[str, Tensor], layers: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the UNet and of the resampler under diffusers' names; `layers` as in `rename_unet`.

    Raises ValueError for a name that has none.
    """
    of_resampler: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_RESAMPLER):
            of_resampler |= _rename_resampler(name.removeprefix(_RESAMPLER), tensor)
    return (
        rename_unet({name: tensor for name, tensor in state.items() if not name.startswith(_RESAMPLER)}, layers),
        of_resampler,
    )


def _rename_resampler(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Keys and values, which the authors have in one, in two."""
    if not name.startswith("layers."):
        return {name: tensor}
    _, number, part = name.split(".", 2)
    layer, kind = f"layers.{number}", part.rpartition(".")[2]
    if part == "0.to_kv.weight":
        keys, values = tensor.chunk(2)
        return {f"{layer}.attn.to_k.weight": keys, f"{layer}.attn.to_v.weight": values}
    try:
        return {f"{layer}.{_OF_LAYER[part.rpartition('.')[0]]}.{kind}": tensor}
    except KeyError:
        raise ValueError(f"{_RESAMPLER}{name!r} is no name of ImageDream's resampler") from None
