"""Voxels of a sparse structure: which are neighbours, children and parents, and convolutions over them.

A table is made once for a structure; all steps of a flow use it. Rows that are missing are a row of zeros behind the
last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.generators.trellis.layers import Sequences, owners

#: how many numbers are gathered at once for a convolution
GATHERED = 2**27


@dataclass(frozen=True)
class Level:
    """Voxels of one or several samples at one resolution, those of a sample beside each other."""

    coords: Tensor  # (N, 3) int64
    neighbours: Tensor  # (N, 27) rows of the voxels around and of the voxel itself; N: there is none
    lengths: tuple[int, ...]  # voxels of each sample
    resolution: int

    @cached_property
    def owners(self) -> Tensor:
        """(N,) the sample of each voxel."""
        return owners(self.lengths, self.coords.device)

    @cached_property
    def sequences(self) -> Sequences:
        return Sequences.of(self.lengths, self.coords.device)


@dataclass(frozen=True)
class Voxels:
    """A structure at its own resolution and at half of it."""

    fine: Level
    coarse: Level
    parents: Tensor  # (N,) rows of ``coarse``
    children: Tensor  # (M, 8) rows of ``fine``; N: there is none

    @classmethod
    def of(cls, coords: Tensor, resolution: int) -> Voxels:
        """Of one sample's voxels (N, 3), each in 0 to ``resolution`` - 1 and there once."""
        half = -(-resolution // 2)
        code = _flat(coords // 2, half)
        codes, parents = code.unique(return_inverse=True)
        coarse = torch.stack([codes // half**2, codes // half % half, codes % half], dim=1)
        children = torch.full((len(codes), 8), len(coords), device=coords.device)
        children[parents, _flat(coords % 2, 2)] = torch.arange(len(coords), device=coords.device)
        return cls(_level(coords, resolution), _level(coarse, half), parents, children)

    @classmethod
    def join(cls, samples: Sequence[Voxels]) -> Voxels:
        """Of several samples, one after the other."""
        if len(samples) == 1:
            return samples[0]
        fine, coarse = _join([s.fine for s in samples]), _join([s.coarse for s in samples])
        starts = _starts([len(s.coarse.coords) for s in samples])
        parents = torch.cat([s.parents + start for s, start in zip(samples, starts, strict=True)])
        children = _shifted([s.children for s in samples], [len(s.fine.coords) for s in samples])
        return cls(fine, coarse, parents, children)

    @cached_property
    def neighbours_parents(self) -> Tensor:
        """(N, 27) rows of ``coarse``: the parents of each fine voxel's neighbours; M: there is none."""
        return F.pad(self.parents, (0, 1), value=len(self.coarse.coords))[self.fine.neighbours]


def _flat(coords: Tensor, side: int) -> Tensor:
    return (coords[:, 0] * side + coords[:, 1]) * side + coords[:, 2]


def _level(coords: Tensor, resolution: int) -> Level:
    side = resolution + 2  # a border without voxels
    table = torch.full((side**3,), len(coords), device=coords.device)
    places = _flat(coords + 1, side)
    table[places] = torch.arange(len(coords), device=coords.device)
    steps = torch.arange(-1, 2, device=coords.device)
    offsets = _flat(torch.cartesian_prod(steps, steps, steps), side)
    return Level(coords, table[places[:, None] + offsets], (len(coords),), resolution)


def _starts(counts: list[int]) -> list[int]:
    return [sum(counts[:number]) for number in range(len(counts))]


def _shifted(tables: list[Tensor], counts: list[int]) -> Tensor:
    """Tables of rows, of which the n-th has ``counts[n]``, as one table of all their rows."""
    total = sum(counts)
    return torch.cat(
        [
            torch.where(table == count, total, table + start)
            for table, count, start in zip(tables, counts, _starts(counts), strict=True)
        ]
    )


def _join(levels: list[Level]) -> Level:
    return Level(
        torch.cat([level.coords for level in levels]),
        _shifted([level.neighbours for level in levels], [len(level.coords) for level in levels]),
        tuple(length for level in levels for length in level.lengths),
        levels[0].resolution,
    )


def downsample(features: Tensor, voxels: Voxels) -> Tensor:
    """(M, C) of fine features (N, C): the sum of a voxel's n children over n + 1.

    It is not their mean: so the authors' code pools, for its zero to begin with counts as one of them, and so their
    models were trained.
    """
    children = F.pad(features, (0, 0, 0, 1))[voxels.children].float()
    count = (voxels.children < len(features)).sum(1, keepdim=True)
    return (children.sum(1) / (count + 1)).to(features.dtype)


class Kernel(nn.Module):
    """A kernel as spconv stores it: outputs, three axes, inputs."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, 3, channels).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(out_channels))


class SubmanifoldConv(nn.Module):
    """A convolution of 3 x 3 x 3 whose outputs are where inputs are (Graham et al., 2017, arXiv:1706.01307)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Kernel(channels, out_channels)

    def forward(self, features: Tensor, rows: Tensor) -> Tensor:
        """(N, O) of features (M, C) and rows (N, 27) of them; M: there is none.

        Where there are fewer features than outputs, as for voxels that all have their parents' features, each feature
        is multiplied first and what is gathered are products.
        """
        weight, bias = self.conv.weight, self.conv.bias
        outputs, channels = weight.shape[0], weight.shape[-1]
        padded = F.pad(features, (0, 0, 0, 1))
        if len(features) < len(rows):
            products = F.linear(padded, weight.reshape(outputs, 27, channels).transpose(0, 1).flatten(0, 1))
            places = rows * 27 + torch.arange(27, device=rows.device)
            return F.embedding_bag(places, products.view(-1, outputs), mode="sum") + bias
        kernel = weight.reshape(outputs, -1)
        parts = [
            F.linear(padded[part].flatten(1), kernel, bias) for part in rows.split(max(1, GATHERED // kernel.shape[1]))
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
