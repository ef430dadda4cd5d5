"""From a structure's latent to which voxels are there: a convolutional decoder of a dense grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation of the channels of (B, C, X, Y, Z), in float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x.movedim(1, -1).float(), self.normalized_shape, self.weight, self.bias, self.eps)
        return h.to(x.dtype).movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Two normalised convolutions of (B, C, X, Y, Z), and the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Upsampling(nn.Module):
    """Twice the resolution: each cell's channels become those of two by two by two cells."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        batch, _, *sides = h.shape
        h = h.view(batch, -1, 2, 2, 2, *sides).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return h.reshape(batch, -1, *(2 * side for side in sides))


class StructureDecoder(nn.Module):
    """Latents (B, C, R, R, R) to logits (B, 1, 4R, 4R, 4R) of each voxel, under the authors' names and options."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: Sequence[int],
        num_res_blocks_middle: int = 2,
    ) -> None:
        super().__init__()
        self.input_layer = nn.Conv3d(latent_channels, channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(*(ResidualBlock(channels[0]) for _ in range(num_res_blocks_middle)))
        self.blocks = nn.ModuleList()
        for width, following in zip(channels, [*channels[1:], None], strict=True):
            self.blocks.extend(ResidualBlock(width) for _ in range(num_res_blocks))
            if following is not None:
                self.blocks.append(Upsampling(width, following))
        last = channels[-1]
        self.out_layer = nn.Sequential(ChannelNorm(last), nn.SiLU(), nn.Conv3d(last, out_channels, 3, padding=1))

    @property
    def torso(self) -> list[nn.Module]:
        """The parts that are computed in half precision where the checkpoint says so."""
        return [self.middle_block, self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        blocks = [*self.middle_block, *self.blocks]
        h = self.input_layer(x).to(next(blocks[0].conv1.parameters()).dtype)
        for block in blocks:
            h = block(h)
        logits: Tensor = self.out_layer(h.float())
        return logits
