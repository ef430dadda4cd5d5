"""A small random TRELLIS and DINOv2 in the published layout, for tests of what loads and runs the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from generation.generators.trellis.gaussian_decoder import GaussianDecoder
from generation.generators.trellis.slat_flow import SlatFlow
from generation.generators.trellis.structure_decoder import StructureDecoder
from generation.generators.trellis.structure_flow import StructureFlow
from generation.generators.trellis.weights import build as build_network

WIDTH, CHANNELS, SIDE, PICTURE = 32, 4, 16, 56
_FLOW: dict[str, Any] = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "model_channels": WIDTH, "cond_channels": WIDTH,
    "num_blocks": 2, "num_heads": 2, "mlp_ratio": 2, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True,
}  # fmt: skip
PARTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "ss_flow": ("sparse_structure_flow_model", StructureFlow, _FLOW | {"resolution": 4, "patch_size": 1}),
    "ss_dec": (
        "sparse_structure_decoder", StructureDecoder,
        {"out_channels": 1, "latent_channels": CHANNELS, "num_res_blocks": 1, "channels": [16, 8, 8], "use_fp16": True},
    ),
    "slat_flow": (
        "slat_flow_model", SlatFlow,
        _FLOW | {"resolution": SIDE, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [8]},
    ),
    "slat_dec": (
        "slat_decoder_gs", GaussianDecoder,
        {
            "resolution": SIDE, "model_channels": WIDTH, "latent_channels": CHANNELS, "num_blocks": 2, "num_heads": 2,
            "mlp_ratio": 2, "attn_mode": "swin", "window_size": 8, "use_fp16": True,
            "representation_config": {
                "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
                "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 32, "2d_filter_kernel_size": 0.1,
                "3d_filter_kernel_size": 9e-4, "scaling_bias": 0.016, "opacity_bias": 0.5,
                "scaling_activation": "softplus",
            },
        },
    ),
}  # fmt: skip


def build(folder: Path, share: float = 0.15) -> Path:
    """Write trellis/ and dinov2/ into ``folder``, with cards; of a structure's voxels about ``share`` are there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {}
        (folder / "trellis" / "ckpts").mkdir(parents=True)
        for name, (key, kind, config) in PARTS.items():
            network = build_network(kind, config)
            _draw(network)
            if isinstance(network, StructureDecoder):
                _set_share(network, share)
            path = folder / "trellis" / "ckpts" / name
            path.with_suffix(".json").write_text(json.dumps({"name": kind.__name__, "args": config}))
            save_file(network.state_dict(), path.with_suffix(".safetensors"))
            models[key] = f"ckpts/{name}"
        normalisation = {"mean": [0.0] * CHANNELS, "std": [1.0] * CHANNELS}
        about = {"args": {"models": models, "slat_normalization": normalisation}}
        (folder / "trellis" / "pipeline.json").write_text(json.dumps(about))
        config = Dinov2WithRegistersConfig(
            hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=PICTURE, patch_size=14
        )
        Dinov2WithRegistersModel(config).save_pretrained(folder / "dinov2")
    for name in ("trellis", "dinov2"):
        (folder / name / "card.json").write_text(
            json.dumps({"name": f"mini-{name}", "licence": "none: random numbers"})
        )
    return folder


def _draw(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and not name.endswith("gamma"):
            nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5)


def _set_share(decoder: StructureDecoder, share: float) -> None:
    """By the decoder's last bias. What it gets is about as large as noise."""
    with torch.no_grad():
        logits = decoder(torch.randn(4, CHANNELS, 4, 4, 4))
        last = decoder.out_layer[2]
        assert isinstance(last, nn.Conv3d)
        assert last.bias is not None
        last.bias -= logits.flatten().quantile(1 - share)


def change(folder: Path, part: str, **tensors: torch.Tensor) -> None:
    """Put other tensors into a part's file; ``__`` in a name stands for a dot."""
    path = folder / "trellis" / "ckpts" / f"{part}.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
