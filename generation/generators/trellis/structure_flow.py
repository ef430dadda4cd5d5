"""The flow that makes a structure's latent from noise: a transformer over all cells of a small grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generation.generators.trellis.layers import (
    FlowBlock,
    Memory,
    Packing,
    TimeEmbedding,
    plain_norm,
    position_embedding,
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
        self.blocks = nn.ModuleList(
            FlowBlock(model_channels, cond_channels, num_heads, mlp_ratio, qk_rms_norm) for _ in range(num_blocks)
        )
        self.out_layer = nn.Linear(model_channels, out_channels)

    @property
    def half(self) -> list[nn.Module]:
        """The parts that are computed in half precision where the checkpoint says so."""
        return [self.blocks]

    def remember(self, features: Tensor) -> list[Memory]:
        """What the blocks know of a picture with these features (S, C); it serves at all steps."""
        return [block.cross_attn.remember(features) for block in self.blocks]

    def forward(self, x: Tensor, t: Tensor, memories: Sequence[list[Memory]]) -> Tensor:
        """Velocities (B, C, R, R, R) float32 at times ``t`` (B,), 0 to 1000.

        The first samples are led by pictures: ``memories`` has what ``remember`` gave for each. The others are not.
        """
        batch, cells = len(x), self.resolution**3
        packing = Packing((cells,) * batch, len(memories))
        owners = packing.owners(x.device)
        h = self.input_layer(x.flatten(2).transpose(1, 2)) + self.pos_emb
        dtype = self.blocks[0].self_attn.to_out.weight.dtype
        h, time = h.flatten(0, 1).to(dtype), self.t_embedder(t).to(dtype)
        for number, block in enumerate(self.blocks):
            h = block(h, time, packing, owners, [memory[number] for memory in memories])
        h = self.out_layer(plain_norm(h)).view(batch, cells, -1)
        return h.transpose(1, 2).reshape(batch, -1, *x.shape[2:])
