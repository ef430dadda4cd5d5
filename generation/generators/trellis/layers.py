"""What TRELLIS's transformers are made of (Xiang et al., 2024, arXiv:2412.01506), under its authors' parameter names.

Tokens of several samples stand one after the other in one tensor (T, C); a ``Packing`` says whose they are. So a batch
of samples with as many tokens each, and one of samples with different numbers of them, are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: of the layer norms inside of blocks; those before an output layer and of the condition have PyTorch's own 1e-5
BLOCK_EPS = 1e-6
#: keys and values (S, heads, D) of a picture's features in one block
KeyValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Packing:
    """Samples whose tokens stand one after the other.

    First come all samples, conditional on a picture. Then the first ``guided`` ones once more, unconditional:
    classifier-free guidance needs both.
    """

    lengths: tuple[int, ...]  # tokens of each conditional sample
    guided: int

    @cached_property
    def all_lengths(self) -> tuple[int, ...]:
        return self.lengths + self.lengths[: self.guided]

    @cached_property
    def conditional(self) -> int:
        """Number of conditional tokens; they come first."""
        return sum(self.lengths)

    @cached_property
    def again(self) -> int:
        """Number of unconditional tokens."""
        return sum(self.lengths[: self.guided])


def owners(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(T,) the sample of each token, of samples with ``lengths``."""
    return torch.cat([torch.full((length,), number, device=device) for number, length in enumerate(lengths)])


def twice(x: Tensor, first: int) -> Tensor:
    """``x`` followed by its ``first`` rows once more."""
    return torch.cat([x, x[:first]]) if first else x


def position_embedding(coords: Tensor, channels: int) -> Tensor:
    """(N, channels) float32 of integer coordinates (N, 3).

    Sines, then cosines, of one axis after the other, each with channels // 6 frequencies; zeros fill the rest.
    """
    count = channels // 3 // 2
    frequencies = 1.0 / (10000 ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count))
    angles = coords.float()[:, :, None] * frequencies  # (N, 3, count)
    embedded = torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)
    return F.pad(embedded, (0, channels - embedded.shape[1]))


class TimeEmbedding(nn.Module):
    """Times (B,), 0 to 1000, to (B, channels): cosines, then sines, then two layers."""

    def __init__(self, channels: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, channels), nn.SiLU(), nn.Linear(channels, channels))
        self._half = frequencies // 2

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(self._half, dtype=torch.float32, device=t.device) / self._half
        angles = t.float()[:, None] * 10000.0**-steps
        embedded: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        return embedded


class HeadNorm(nn.Module):
    """Root mean square normalisation of each head's query or key, in float32."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(T, heads, channels) as it is."""
        return (F.normalize(x.float(), dim=-1) * self.gamma * x.shape[-1] ** 0.5).to(x.dtype)


class FeedForward(nn.Module):
    """A two-layer perceptron over tokens (T, C), ``ratio`` times as wide inside."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.mlp(x)
        return result


class SelfAttention(nn.Module):
    """The layers around a self attention; the product itself is ``attend``."""

    def __init__(self, channels: int, heads: int, normalised: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.q_rms_norm = HeadNorm(heads, channels // heads) if normalised else None
        self.k_rms_norm = HeadNorm(heads, channels // heads) if normalised else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (T, heads, D) of tokens (T, C)."""
        q, k, v = self.to_qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        if self.q_rms_norm is not None and self.k_rms_norm is not None:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        return q, k, v


class CrossAttention(nn.Module):
    """Attention of tokens to a picture's features. Queries and keys are not normalised in the models for pictures."""

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(context_channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def project_context(self, features: Tensor) -> KeyValues:
        """Keys and values (S, heads, D) of a picture's features (S, C). They are the same at all steps of a flow."""
        kv = self.to_kv(features.to(self.to_kv.weight.dtype)).view(len(features), 2, self.heads, -1)
        k, v = kv.unbind(1)
        return k.contiguous(), v.contiguous()

    def unconditional(self) -> Tensor:
        """The result (C,) of attention to a picture's features that are all zero, which is the unconditional case.

        All keys are equal then, and so are all values: the bias. Their mean is the bias, whatever the query.
        """
        bias = self.to_kv.bias
        assert bias is not None
        result: Tensor = self.to_out(bias[len(bias) // 2 :])
        return result


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], context: tuple[int, ...]) -> Tensor:
    """(T, heads, D): each sample's queries (T in all) see its own keys and values (S in all), heads beside each other.

    ``lengths`` and ``context`` are how many of T and S each sample has.
    """
    if len(set(lengths)) == 1 and len(set(context)) == 1:
        batch = len(lengths)
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
        # Detached it is no view, as what is concatenated below: torch.compile would make code for both.
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1).detach()
    parts = zip(q.split(lengths), k.split(context), v.split(context), strict=True)
    return torch.cat([attend(*part, (len(part[0]),), (len(part[1]),)) for part in parts])


def plain_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation without weights, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class FlowBlock(nn.Module):
    """A transformer block of both flows: self attention and feed-forward are shifted, scaled and gated by the time,
    cross attention is not.

    It is three functions between attentions, so that each can be compiled.
    """

    def __init__(self, channels: int, context_channels: int, heads: int, ratio: float, normalised: bool) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(channels, eps=BLOCK_EPS)
        self.self_attn = SelfAttention(channels, heads, normalised)
        self.cross_attn = CrossAttention(channels, context_channels, heads)
        self.mlp = FeedForward(channels, ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(
        self, x: Tensor, time: Tensor, packing: Packing, owners: Tensor, contexts: Sequence[KeyValues]
    ) -> Tensor:
        """Tokens (T, C) one block on.

        time: (B, C) of each sample of T; owners: (T,) the sample of each token; contexts: of each conditional sample.
        """
        shift, scale, gate, *feed_forward = self.adaLN_modulation(time).chunk(6, dim=1)
        q, k, v = self.before(x, shift, scale, owners)
        seen = attend(q, k, v, packing.all_lengths, packing.all_lengths)
        x, q = self.between(x, seen, gate, owners, packing.conditional)
        keys, values = (torch.cat(each) if len(each) > 1 else each[0] for each in zip(*contexts, strict=True))
        seen = attend(q, keys, values, packing.lengths, tuple(len(keys) for keys, _ in contexts))
        return self.after(x, seen, owners, *feed_forward)

    def before(self, x: Tensor, shift: Tensor, scale: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = plain_norm(x, BLOCK_EPS).to(x.dtype)
        return self.self_attn.project(h * (1 + scale[owners]) + shift[owners])

    def between(self, x: Tensor, seen: Tensor, gate: Tensor, owners: Tensor, conditional: int) -> tuple[Tensor, Tensor]:
        """Tokens after self attention, and the cross attention's queries (conditional, heads, D) of the first ones."""
        x = x + self.self_attn.to_out(seen.flatten(1)) * gate[owners]
        norm = self.norm2
        h = F.layer_norm(x[:conditional].float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
        return x, self.cross_attn.to_q(h).unflatten(1, (self.cross_attn.heads, -1))

    def after(
        self, x: Tensor, seen: Tensor, owners: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:  # fmt: skip
        """Tokens after the block. ``seen`` has a row for each conditional token; they come first."""
        conditional = len(seen)
        unconditional = self.cross_attn.unconditional().expand(len(x) - conditional, -1)
        x = x + torch.cat([self.cross_attn.to_out(seen.flatten(1)), unconditional])
        h = plain_norm(x, BLOCK_EPS).to(x.dtype)
        h = self.mlp(h * (1 + scale[owners]) + shift[owners])
        return x + h * gate[owners]


class FlowBlocks(nn.ModuleList):
    """The blocks of a flow, one after the other."""

    def __init__(
        self, count: int, channels: int, context_channels: int, heads: int, ratio: float, normalised: bool
    ) -> None:
        super().__init__(FlowBlock(channels, context_channels, heads, ratio, normalised) for _ in range(count))

    def __iter__(self) -> Iterator[FlowBlock]:
        return cast(Iterator[FlowBlock], super().__iter__())

    @property
    def dtype(self) -> torch.dtype:
        """What they compute in."""
        return next(iter(self)).self_attn.to_out.weight.dtype

    def project_context(self, features: Tensor) -> list[KeyValues]:
        """Keys and values of a picture's features (S, C) for each block. They are the same at all steps."""
        return [block.cross_attn.project_context(features) for block in self]

    def run(
        self, x: Tensor, time: Tensor, packing: Packing, owners: Tensor, contexts: Sequence[list[KeyValues]]
    ) -> Tensor:
        """Tokens (T, C) after all of them; see ``FlowBlock.forward``."""
        for number, block in enumerate(self):
            x = block(x, time, packing, owners, [context[number] for context in contexts])
        return x
