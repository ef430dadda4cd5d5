"""The flow that makes a structure's latent from noise: a transformer over all cells of a small grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generation.generators.trellis.layers import (
    FlowBlocks,
    Packing,
    Sequences,
    TimeEmbedding,
    owners,
    plain_norm,
    position_embedding,
    twice,
)


class StructureFlow(nn.Module):
    """Velocity of noisy latents (B, C, R, R, R), under the authors' names and options."""

    pos_emb: Tensor

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        model_channels: int,
        cond_channels: int,
        out_channels: int,
        num_blocks: int,
        num_heads: int,
        mlp_ratio: float = 4,
        qk_rms_norm: bool = False,
    ) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, in_channels
        axes = [torch.arange(resolution)] * 3
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
        self.t_embedder = TimeEmbedding(model_channels)
        self.register_buffer("pos_emb", position_embedding(cells, model_channels))
        self.input_layer = nn.Linear(in_channels, model_channels)
        self.blocks = FlowBlocks(num_blocks, model_channels, cond_channels, num_heads, mlp_ratio, qk_rms_norm)
        self.out_layer = nn.Linear(model_channels, out_channels)

    @property
    def torso(self) -> list[nn.Module]:
        """The parts that are computed in half precision where the checkpoint says so."""
        return [self.blocks]

    def project_context(self, features: Tensor) -> Tensor:
        """See ``FlowBlocks.project_context``."""
        return self.blocks.project_context(features)

    def forward(self, x: Tensor, t: Tensor, contexts: Sequence[Tensor], guided: int) -> Tensor:
        """Velocities (B + guided, C, R, R, R) float32 of noisy latents at times ``t`` (B,), 0 to 1000.

        contexts: of each sample, from ``project_context``. The result has the conditional velocities, and then the
        unconditional ones of the first ``guided`` samples.
        """
        cells = self.resolution**3
        count, device = len(x) + guided, x.device
        samples, conditional = (Sequences.of_equal_length(each, cells, device) for each in (count, len(x)))
        packing = Packing(samples, owners([cells] * count, device), conditional, len(x) * cells)
        dtype = self.blocks.dtype
        h = (self.input_layer(x.flatten(2).transpose(1, 2)) + self.pos_emb).flatten(0, 1).to(dtype)
        h, time = twice(h, guided * cells), twice(self.t_embedder(t).to(dtype), guided)
        h = self.blocks.run(h, time, packing, contexts)
        h = self.out_layer(plain_norm(h)).view(-1, cells, self.out_layer.out_features)
        return h.transpose(1, 2).unflatten(2, x.shape[2:])
