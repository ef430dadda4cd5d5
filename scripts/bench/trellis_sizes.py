"""The configs of TRELLIS-image-large's files, and its networks of that size with random weights.

As its authors have them in their repository (github.com/microsoft/TRELLIS, configs/).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig

from generation.generators.trellis.condition import Condition
from generation.generators.trellis.gaussian_decoder import GaussianDecoder
from generation.generators.trellis.slat_flow import SlatFlow
from generation.generators.trellis.structure_decoder import StructureDecoder
from generation.generators.trellis.structure_flow import StructureFlow
from generation.generators.trellis.weights import Networks, build, prepare

_FLOW: dict[str, Any] = {
    "in_channels": 8, "out_channels": 8, "model_channels": 1024, "cond_channels": 1024, "num_blocks": 24,
    "num_heads": 16, "mlp_ratio": 4, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True,
}  # fmt: skip
GAUSSIANS: dict[str, Any] = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 32, "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4, "scaling_bias": 4e-3, "opacity_bias": 0.1, "scaling_activation": "softplus",
}  # fmt: skip
PUBLISHED: dict[type[nn.Module], dict[str, Any]] = {
    StructureFlow: _FLOW | {"resolution": 16, "patch_size": 1},
    StructureDecoder: {
        "out_channels": 1, "latent_channels": 8, "num_res_blocks": 2, "num_res_blocks_middle": 2,
        "channels": [512, 128, 32], "use_fp16": True,
    },
    SlatFlow: _FLOW | {"resolution": 64, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [128]},
    GaussianDecoder: {
        "resolution": 64, "model_channels": 768, "latent_channels": 8, "num_blocks": 12, "num_heads": 12,
        "mlp_ratio": 4, "attn_mode": "swin", "window_size": 8, "use_fp16": True, "representation_config": GAUSSIANS,
    },
}  # fmt: skip
#: of a structure; with the decoder's weights as they are drawn here a quarter of them are left when taken by eight
VOXELS = 13_500


def networks(device: str, dtype: torch.dtype = torch.float16) -> Networks:
    """0.56, 0.07, 0.60 and 0.09 billion parameters; structures of about ``VOXELS`` voxels, by the decoder's bias."""
    torch.manual_seed(0)
    flow, decoder, slat_flow, gaussian_decoder = (_drawn(kind, device, dtype) for kind in PUBLISHED)
    like_a_surface(decoder)
    zeros, ones = torch.zeros(8, device=device), torch.ones(8, device=device)
    return Networks(flow, decoder, slat_flow, gaussian_decoder, zeros, ones)


def _drawn(kind: Any, device: str, dtype: torch.dtype) -> Any:
    with torch.device(device):
        network = build(kind, PUBLISHED[kind])
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and not name.endswith("gamma"):
                nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)
        if kind in (StructureFlow, SlatFlow):  # so that what guidance makes of noise stays like it
            nn.init.normal_(network.out_layer.weight, std=1e-3)
    return prepare(network, dtype)


@torch.no_grad()
def like_a_surface(decoder: StructureDecoder, voxels: int = VOXELS) -> None:
    """Have voxels stand beside each other, as a shape's do, and so many of them."""
    blocks: Any = decoder.blocks
    last: Any = decoder.out_layer[2]
    upsampling = blocks[-3].conv
    eight = upsampling.weight.view(-1, 8, *upsampling.weight.shape[1:])  # for each voxel of the eight that one becomes
    eight.copy_(eight[:, :1] + 0.15 * eight)
    for block in blocks[-2:]:
        block.conv2.weight.mul_(0.1)
    centre = last.weight[:, :, 1, 1, 1].clone()
    last.weight.mul_(0.05)[:, :, 1, 1, 1] = centre
    device, channels = last.weight.device, decoder.input_layer.in_channels
    logits = torch.cat([decoder(_noise(seed, channels, device)).flatten() for seed in range(4)])
    last.bias.sub_(logits.topk(4 * voxels).values[-1])


def _noise(seed: int, channels: int, device: torch.device) -> Tensor:
    return torch.randn(1, channels, 16, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)


def condition(device: str, dtype: torch.dtype = torch.float16) -> Condition:
    """DINOv2-L with registers, 0.3 billion parameters."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )
    with torch.device(device):
        return Condition.build(config).to(device, dtype)
