"""From structured latents to Gaussians: a transformer whose attention stays within shifted windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.generators.trellis.layers import (
    BLOCK_EPS,
    FeedForward,
    SelfAttention,
    Sequences,
    attend,
    plain_norm,
    position_embedding,
)
from generation.generators.trellis.sparse import Level


@dataclass(frozen=True)
class RawGaussians:
    """The decoder's N Gaussians, after activation, float32, in the model's own frame.

    That frame is a cube of side 1 around the origin, its z up.
    """

    means: Tensor  # (N, 3)
    colours: Tensor  # (N, 3) spherical harmonics of degree 0
    scales: Tensor  # (N, 3) standard deviations
    quats: Tensor  # (N, 4) w, x, y, z, not normalised
    opacities: Tensor  # (N,) logits


class Windows:
    """Tokens by the window that they are in. The host waits for nothing: windows without a token are there, too."""

    def __init__(self, level: Level, size: int, shift: int) -> None:
        count = -(-(level.resolution + shift) // size)  # along an axis
        x, y, z = ((level.coords + shift) // size).unbind(1)
        window = ((level.owners * count + x) * count + y) * count + z
        each = torch.arange(len(level.lengths) * count**3 + 1, device=window.device)
        self.order = window.argsort(stable=True)  # (T,) tokens, those of a window beside each other
        self.places = torch.empty_like(self.order)  # (T,) of each token among them
        self.places[self.order] = torch.arange(len(window), device=window.device)
        starts = torch.searchsorted(window[self.order], each, out_int32=True)
        self.sequences = Sequences(starts, min(size**3, max(level.lengths)))


class WindowBlock(nn.Module):
    """A transformer block over tokens (T, C) whose attention stays within windows."""

    def __init__(self, channels: int, heads: int, ratio: float, normalised: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(channels, heads, normalised)
        self.mlp = FeedForward(channels, ratio)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        q, k, v = self.attn.project(plain_norm(x, BLOCK_EPS).to(x.dtype)[windows.order])
        seen = attend(q, k, v, windows.sequences, windows.sequences)[windows.places]
        x = x + self.attn.to_out(seen.flatten(1))
        return x + self.mlp(plain_norm(x, BLOCK_EPS).to(x.dtype))


def perturbation(count: int, voxel_size: float) -> Tensor:
    """(count, 3) where a voxel's Gaussians are before the decoder moves them: a Hammersley set in the cell, before
    the tanh that ends at ``voxel_size`` cells."""

    def inverse(base: int, number: int) -> float:
        value, share = 0.0, 1.0 / base
        while number:
            value += number % base * share
            number, share = number // base, share / base
        return value

    points = torch.tensor([[i / count, inverse(2, i), inverse(3, i)] for i in range(count)])
    return torch.atanh((2 * points - 1) / voxel_size)


class GaussianDecoder(nn.Module):
    """Latents of voxels to Gaussians, under the authors' names and options."""

    offset_perturbation: Tensor

    def __init__(
        self,
        resolution: int,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        num_heads: int,
        representation_config: Mapping[str, Any],
        mlp_ratio: float = 4,
        window_size: int = 8,
        qk_rms_norm: bool = False,
    ) -> None:
        super().__init__()
        self.resolution, self.window_size = resolution, window_size
        self.each = int(representation_config["num_gaussians"])
        self._about = representation_config
        self.input_layer = nn.Linear(latent_channels, model_channels)
        self.blocks = nn.ModuleList(
            WindowBlock(model_channels, num_heads, mlp_ratio, qk_rms_norm) for _ in range(num_blocks)
        )
        self.out_layer = nn.Linear(model_channels, 14 * self.each)
        self.register_buffer("offset_perturbation", perturbation(self.each, float(representation_config["voxel_size"])))

    @property
    def _dtype(self) -> torch.dtype:
        first = self.blocks[0]
        assert isinstance(first, WindowBlock)
        return first.attn.to_out.weight.dtype

    @property
    def torso(self) -> list[nn.Module]:
        """The parts that are computed in half precision where the checkpoint says so."""
        return [self.blocks]

    def forward(self, x: Tensor, level: Level) -> list[RawGaussians]:
        """Of each sample, from the latents (T, C) of all samples' voxels."""
        h = self.input_layer(x) + position_embedding(level.coords, self.input_layer.out_features)
        h = h.to(self._dtype)
        windows = [Windows(level, self.window_size, shift) for shift in (0, self.window_size // 2)]
        for number, block in enumerate(self.blocks):
            h = block(h, windows[number % 2])
        raw = self.out_layer(plain_norm(h))
        samples = zip(raw.split(level.lengths), level.coords.split(level.lengths), strict=True)
        return [self._gaussians(features, coords) for features, coords in samples]

    def _gaussians(self, features: Tensor, coords: Tensor) -> RawGaussians:
        about, each = self._about, self.each
        rates = about["lr"]
        names = ("_xyz", "_features_dc", "_scaling", "_rotation", "_opacity")
        columns = features.split([3 * each, 3 * each, 3 * each, 4 * each, each], dim=1)
        moved, colours, scales, quats, opacities = (
            (column * rates[name]).view(len(coords), each, -1) for name, column in zip(names, columns, strict=True)
        )
        if about["perturb_offset"]:
            moved = moved + self.offset_perturbation
        offsets = moved.tanh() / self.resolution * 0.5 * about["voxel_size"]
        means = ((coords + 0.5) / self.resolution)[:, None] + offsets - 0.5
        bias = float(about["scaling_bias"])
        spread = F.softplus(scales + bias + math.log(-math.expm1(-bias)))
        least, opaque = float(about["3d_filter_kernel_size"]), float(about["opacity_bias"])
        quats[..., 0] += 1  # the identity; a tensor of it would be a copy that the host waits for
        return RawGaussians(
            means=means.flatten(0, 1),
            colours=colours.flatten(0, 1),
            scales=(spread.square() + least**2).sqrt().flatten(0, 1),
            quats=quats.flatten(0, 1),
            opacities=(opacities + math.log(opaque / (1 - opaque))).flatten(),
        )
