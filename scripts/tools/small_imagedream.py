"""ImageDream around its UNet, small and with random weights, as the authors' pipeline saves a folder of it.

What stands in no config of theirs is as it is: pictures of 256 pixels, and a vision tower 1280 wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from scripts.tools.golden_weights import weights

M = TypeVar("M", bound=nn.Module)

# Parts whose output is added to what goes through the UNet or the resampler, or is normalised next.
_QUIET = (
    ".input_blocks.0.0", ".in_layers.2", ".out_layers.3", ".skip_connection", ".op", ".conv", ".proj_in", ".proj_out",
    ".to_out.0", ".to_out", ".net.2", ".1.3", ".emb_layers.1",
)  # fmt: skip

TOKENIZER = Path(__file__).resolve().parents[2] / "generation" / "weights" / "tiny" / "mvdream" / "tokenizer"


def write(folder: Path, context_width: int, latent_size: int = 8, picture: bool = True) -> Path:
    """All of a folder but its ``unet``; without what is for a `picture` it is MVDream's."""
    levels = (256 // latent_size).bit_length()  # each but the first halves the image
    blocks = (8, 8, 16, 16, 16, 16)[:levels]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=blocks, layers_per_block=1, norm_num_groups=4, sample_size=256, scaling_factor=0.18215,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = CLIPTextConfig(
        hidden_size=context_width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length, projection_dim=context_width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    redrawn(vae, 11).save_pretrained(folder / "vae")
    redrawn(CLIPTextModel(text), 12).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler().save_pretrained(folder / "scheduler")
    if picture:
        vision = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=224,
            patch_size=56, hidden_act="gelu", projection_dim=16,
        )  # fmt: skip
        redrawn(CLIPVisionModel(vision), 13).save_pretrained(folder / "image_encoder")
        CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    return folder


def scheduler() -> DDIMScheduler:
    """As the authors' conversion makes it."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
        clip_sample=False, set_alpha_to_one=False, prediction_type="epsilon",
    )  # fmt: skip


def unet_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Of the authors' UNet; its noise is made small, for guidance and the first steps multiply what rounding does."""
    state = weights(shapes)
    for name in ("out.2.weight", "out.2.bias"):
        state[name] = state[name] / 8
    return state


def quiet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The UNet's weights so small that what is normalised has a variance like the epsilons: they matter then."""

    def is_quiet(name: str) -> bool:
        return name.endswith(".latents") or f".{name.rpartition('.')[0]}".endswith(_QUIET)

    return {name: tensor * 0.02 if is_quiet(name) else tensor for name, tensor in state.items()}


def redrawn(model: M, seed: int) -> M:
    """With random weights in all places, also where a class begins with zeros."""
    shapes: Mapping[str, list[int]] = {
        name: list(tensor.shape) for name, tensor in model.state_dict().items() if tensor.is_floating_point()
    }
    with torch.no_grad():
        for name, tensor in weights(dict(shapes), seed).items():
            model.state_dict()[name].copy_(tensor)
    return model.eval()


def cutout(size: int = 256) -> torch.Tensor:
    """A picture (4, size, size), RGBA in 0..1: blobs of colour, half of it transparent."""
    small = weights({"picture": [1, 4, 12, 12]}, seed=21)["picture"] * 12
    image: torch.Tensor = nn.functional.interpolate(small, (size, size), mode="bicubic").sigmoid()[0]
    return image
