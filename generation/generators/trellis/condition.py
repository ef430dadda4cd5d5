"""Image features for the flows: DINOv2 with registers (Darcet et al., 2023, arXiv:2309.16588)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from generation.generators.trellis.layers import plain_norm
from generation.weights.strict import load_model

# ImageNet statistics, which DINOv2 was trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Condition(nn.Module):
    """Cut-outs to features."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Dinov2WithRegistersModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.size: int = backbone.config.image_size  # pixels, its native ones: positions are not interpolated
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def load(cls, folder: Path, device: str, dtype: torch.dtype) -> Condition:
        """Raises WeightsError when the folder's weights are not exactly its config's."""
        return cls(load_model(Dinov2WithRegistersModel, folder, dtype)).to(device).eval().requires_grad_(False)

    @classmethod
    def build(cls, config: Dinov2WithRegistersConfig) -> Condition:
        """With random weights."""
        return cls(Dinov2WithRegistersModel(config)).eval().requires_grad_(False)

    def forward(self, cutouts: Tensor) -> Tensor:
        """(B, 1 + registers + patches, C) float32 of cut-outs (B, 4, S, S), RGBA in 0..1, on black.

        They are what the last block gives, before DINOv2's own normalisation, and normalised without its weights.
        """
        pixels = (cutouts[:, :3] * cutouts[:, 3:] - self.mean) / self.std
        tokens = self.backbone.embeddings(pixels.to(self.backbone.dtype))
        return plain_norm(self.backbone.encoder(tokens)[0])
