"""The flow that makes the structured latents: a transformer over a structure's voxels, taken together two by two by
two, between sparse convolutions at their own resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.generators.trellis.layers import (
    BLOCK_EPS,
    FlowBlocks,
    Packing,
    TimeEmbedding,
    plain_norm,
    position_embedding,
    twice,
)
from generation.generators.trellis.sparse import SubmanifoldConv, Voxels, downsample


class SparseBlock(nn.Module):
    """A residual block over voxels, which may change their resolution first."""

    def __init__(self, channels: int, time_channels: int, out_channels: int, change: str = "") -> None:
        super().__init__()
        self.change = change  # "down", "up" or nothing
        self.norm1 = nn.LayerNorm(channels, eps=BLOCK_EPS)
        self.conv1 = SubmanifoldConv(channels, out_channels)
        self.conv2 = SubmanifoldConv(out_channels, out_channels)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, 2 * out_channels))
        self.skip_connection = nn.Linear(channels, out_channels) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, voxels: Voxels) -> Tensor:
        """Features (N, C) of the fine voxels, or of the coarse ones before they are changed up and after down."""
        if self.change == "down":
            x = downsample(x, voxels)
        level = voxels.coarse if self.change == "down" else voxels.fine
        scale, shift = self.emb_layers(time).chunk(2, dim=1)
        norm = self.norm1
        h = F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
        # Upwards, what is computed for each voxel by itself is computed for the parents; then their children copy it.
        h = self.conv1(F.silu(h), voxels.neighbours_parents if self.change == "up" else level.neighbours)
        h = plain_norm(h, BLOCK_EPS).to(h.dtype) * (1 + scale[level.owners]) + shift[level.owners]
        h = self.conv2(F.silu(h), level.neighbours)
        skipped = self.skip_connection(x)
        return h + (skipped[voxels.parents] if self.change == "up" else skipped)


class SlatFlow(nn.Module):
    """Velocity of noisy latents of voxels, under the authors' names and options."""

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        model_channels: int,
        cond_channels: int,
        out_channels: int,
        num_blocks: int,
        num_heads: int,
        io_block_channels: Sequence[int],
        mlp_ratio: float = 4,
        num_io_res_blocks: int = 2,
        qk_rms_norm: bool = False,
    ) -> None:
        super().__init__()
        self.resolution, self.channels = resolution, in_channels
        (width,) = io_block_channels
        inner, more = model_channels, range(num_io_res_blocks - 1)
        self.t_embedder = TimeEmbedding(inner)
        self.input_layer = nn.Linear(in_channels, width)
        self.input_blocks = nn.ModuleList(SparseBlock(width, inner, width) for _ in more)
        self.input_blocks.append(SparseBlock(width, inner, inner, "down"))
        self.blocks = FlowBlocks(num_blocks, inner, cond_channels, num_heads, mlp_ratio, qk_rms_norm)
        self.out_blocks = nn.ModuleList([SparseBlock(2 * inner, inner, width, "up")])
        self.out_blocks.extend(SparseBlock(2 * width, inner, width) for _ in more)
        self.out_layer = nn.Linear(width, out_channels)

    @property
    def torso(self) -> list[nn.Module]:
        """The parts that are computed in half precision where the checkpoint says so."""
        return [self.input_blocks, self.blocks, self.out_blocks]

    def project_context(self, features: Tensor) -> Tensor:
        """See ``FlowBlocks.project_context``."""
        return self.blocks.project_context(features)

    def forward(self, x: Tensor, t: Tensor, contexts: Sequence[Tensor], voxels: Voxels, doubled: Voxels) -> Tensor:
        """Velocities (N + G, C) float32 of the noisy latents (N, C) of all samples' voxels at each sample's time, ``t``
        (B,), 0 to 1000.

        contexts: of each sample, from ``project_context``. ``doubled`` has the samples of ``voxels``, then the first
        ones once more: the result has the conditional velocities, and then the unconditional ones of those.
        """
        guided = len(doubled.fine.lengths) - len(voxels.fine.lengths)
        whole, half = doubled.coarse, voxels.coarse
        packing = Packing(whole.sequences, whole.owners, half.sequences, len(half.coords))
        dtype = self.blocks.dtype
        h, time = self.input_layer(x).to(dtype), self.t_embedder(t).to(dtype)
        skips = []
        for block in self.input_blocks:  # without the picture, so both halves of guidance share them
            h = block(h, time, voxels)
            rows = len(doubled.coarse.coords if block.change else doubled.fine.coords)
            skips.append(twice(h, rows - len(h)))
        h = h + position_embedding(voxels.coarse.coords, h.shape[1]).to(dtype)
        h, time = twice(h, len(whole.coords) - len(h)), twice(time, guided)
        h = self.blocks.run(h, time, packing, contexts)
        for block in self.out_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), time, doubled)
        velocity: Tensor = self.out_layer(plain_norm(h))
        return velocity
