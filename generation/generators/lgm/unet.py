"""LGM's asymmetric UNet, whose views attend to each other (Tang et al. 2024, https://arxiv.org/abs/2402.05054).

Names are those that the authors' weights have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIP = math.sqrt(0.5)  # factor of a sum with a skip connection, which keeps its variance
LAYERS = 2  # of a level of the encoder; the decoder has one more
_EPS = 1e-5


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, N, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class MultiViewAttention(nn.Module):
    """All pixels of all views of an object attend to each other: (B * V, C, H, W)."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, _EPS)
        self.attn = Attention(width, heads)

    def forward(self, x: Tensor, views: int) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).view(n // views, views, c, h, w).permute(0, 1, 3, 4, 2).reshape(n // views, -1, c)
        tokens = self.attn(tokens).view(n // views, views, h, w, c).permute(0, 1, 4, 2, 3).reshape(n, c, h, w)
        return (tokens + x) * SKIP


class ResidualBlock(nn.Module):
    """Two normalised convolutions and a shortcut: (N, C, H, W) to (N, width, H, W)."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, _EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, _EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (hidden + self.shortcut(x)) * SKIP


class Level(nn.Module):
    """Residual blocks, each with an attention behind it where the level `attends`, which then change the size."""

    def __init__(self, widths_in: Sequence[int], width: int, attends: bool, heads: int, groups: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(ResidualBlock(width_in, width, groups) for width_in in widths_in)
        # Where nothing attends there are no weights: None holds the place.
        self.attns = nn.ModuleList(MultiViewAttention(width, heads, groups) if attends else None for _ in widths_in)  # type: ignore[misc]

    def layer(self, i: int, x: Tensor, views: int) -> Tensor:
        x = self.nets[i](x)
        return x if self.attns[i] is None else self.attns[i](x, views)


class DownLevel(Level):
    """A level of the encoder. All but the last one halve the size."""

    def __init__(self, width_in: int, width: int, attends: bool, heads: int, groups: int, last: bool) -> None:
        super().__init__([width_in] + [width] * (LAYERS - 1), width, attends, heads, groups)
        self.downsample = None if last else nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, views: int) -> list[Tensor]:
        """What each layer makes of it; the last is what goes on."""
        results = []
        for i in range(len(self.nets)):
            x = self.layer(i, x, views)
            results.append(x)
        if self.downsample is not None:
            results.append(self.downsample(x))
        return results


class MidLevel(nn.Module):
    """The bottleneck: residual block, attention, residual block."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList(ResidualBlock(width, width, groups) for _ in range(2))
        self.attns = nn.ModuleList([MultiViewAttention(width, heads, groups)])

    def forward(self, x: Tensor, views: int) -> Tensor:
        return self.nets[1](self.attns[0](self.nets[0](x), views))


class UpLevel(Level):
    """A level of the decoder, with skip connections. All but the last one double the size."""

    def __init__(
        self, width_in: int, width_skipped: int, width: int, attends: bool, heads: int, groups: int, last: bool
    ) -> None:
        """`width_skipped`: of what joins its last layer."""
        skipped = [width] * LAYERS + [width_skipped]
        widths = [a + b for a, b in zip([width_in] + [width] * LAYERS, skipped, strict=True)]
        super().__init__(widths, width, attends, heads, groups)
        self.upsample = None if last else nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, skipped: list[Tensor], views: int) -> Tensor:
        """`skipped`: from the way down; the last of them joins first, and is taken out."""
        for i in range(len(self.nets)):
            x = self.layer(i, torch.cat([x, skipped.pop()], 1), views)
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Images (B * V, C, S, S) to features of fewer pixels where there are fewer levels up than down."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        down: Sequence[int],
        down_attends: Sequence[bool],
        up: Sequence[int],
        up_attends: Sequence[bool],
        heads: int = 16,
        groups: int = 32,
    ) -> None:
        """`down`, `up`: widths of the levels, in the order in which they are passed through."""
        super().__init__()
        self.conv_in = nn.Conv2d(channels_in, down[0], 3, padding=1)
        before = [down[0], *down[:-1]]
        self.down_blocks = nn.ModuleList(
            DownLevel(before[i], down[i], down_attends[i], heads, groups, i == len(down) - 1) for i in range(len(down))
        )
        self.mid_block = MidLevel(down[-1], heads, groups)
        before = [up[0], *up[:-1]]
        skipped = [down[max(-2 - i, -len(down))] for i in range(len(up))]
        self.up_blocks = nn.ModuleList(
            UpLevel(before[i], skipped[i], up[i], up_attends[i], heads, groups, i == len(up) - 1)
            for i in range(len(up))
        )
        self.norm_out = nn.GroupNorm(groups, up[-1], _EPS)
        self.conv_out = nn.Conv2d(up[-1], channels_out, 3, padding=1)

    def forward(self, x: Tensor, views: int) -> Tensor:
        skipped = [self.conv_in(x)]
        for level in self.down_blocks:
            skipped += level(skipped[-1], views)
        x = self.mid_block(skipped[-1], views)
        for level in self.up_blocks:
            x = level(x, skipped, views)
        return self.conv_out(F.silu(self.norm_out(x)))
