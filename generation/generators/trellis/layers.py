"""What TRELLIS's transformers are made of (Xiang et al., 2024, arXiv:2412.01506), under its authors' parameter names.

Tokens of several samples stand one after the other in one tensor (T, C); a ``Packing`` says whose they are. So a batch
of samples with as many tokens each, and one of samples with different numbers of them, are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.accelerate.pinned import copy_async

#: of the layer norms inside of blocks; those before an output layer and of the condition have PyTorch's own 1e-5
BLOCK_EPS = 1e-6


@dataclass(frozen=True)
class Sequences:
    """Sequences of tokens that stand one after the other."""

    starts: Tensor  # (S + 1,) int32: where each begins, and where the last one ends
    longest: int  # none has more tokens
    equal: bool = False  # all are that long, and such shapes recur

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Sequences:
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(copy_async(starts, device), max(lengths))

    @classmethod
    def of_equal_length(cls, count: int, length: int, device: torch.device) -> Sequences:
        starts = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)
        return cls(starts, length, equal=True)

    @cached_property
    def lengths(self) -> list[int]:
        """The host waits for them."""
        lengths: list[int] = self.starts.diff().tolist()
        return lengths


@dataclass(frozen=True)
class Packing:
    """Samples whose tokens stand one after the other.

    First come all samples, conditional on a picture. Then the first ones once more, unconditional: classifier-free
    guidance needs both.
    """

    samples: Sequences
    owners: Tensor  # (T,) the sample of each token
    conditional: Sequences  # those of them that are
    tokens: int  # of the conditional ones


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

    def project_context(self, features: Tensor) -> Tensor:
        """Keys and values (S, 2, heads, D) of a picture's features (S, C)."""
        return self.to_kv(features).view(len(features), 2, self.heads, -1)

    def unconditional(self) -> Tensor:
        """The result (C,) of attention to a picture's features that are all zero, which is the unconditional case.

        All keys are equal then, and so are all values: the bias. Their mean is the bias, whatever the query.
        """
        bias = self.to_kv.bias
        assert bias is not None
        result: Tensor = self.to_out(bias[len(bias) // 2 :])
        return result


def attend(q: Tensor, k: Tensor, v: Tensor, queries: Sequences, keys: Sequences) -> Tensor:
    """(T, heads, D): each sequence's queries (T in all) see its own keys and values (S in all), each head by itself.

    Only sequences of equal length go to ``scaled_dot_product_attention``: on Hopper and Blackwell it is cuDNN's, which
    makes a plan for each new shape. That takes the host tens of milliseconds, and every structure has new shapes.
    """
    if queries.equal and keys.equal:
        batch = len(queries.starts) - 1
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
        # Detached, so that it is no view, as the result below: torch.compile would make code for each of the two.
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1).detach()
    if _has_flash_attention(q):
        # The operator behind torch.nn.attention.varlen. That takes 0.04 ms of Python a call, and a step has 48 calls.
        result: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, queries.starts, keys.starts, queries.longest, keys.longest, 0.0, False, False
        )[0]
        return result
    parts = zip(q.split(queries.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True)
    seen = [[x.transpose(0, 1)[None] for x in part] for part in parts if len(part[0])]
    return torch.cat([F.scaled_dot_product_attention(*part)[0].transpose(0, 1) for part in seen])


def _has_flash_attention(q: Tensor) -> bool:
    """Whether PyTorch's own FlashAttention takes such queries: half precision, Ampere or newer, widths by eight."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


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

    def forward(self, x: Tensor, time: Tensor, packing: Packing, context: Tensor, pictures: Sequences) -> Tensor:
        """Tokens (T, C) one block on.

        time: (B, C) of each sample of T; context: (S, 2, heads, D) keys and values of all conditional samples'
        ``pictures``.
        """
        q, k, v, changes = self.before(x, time, packing.owners)
        seen = attend(q, k, v, packing.samples, packing.samples)
        x, q = self.between(x, seen, changes, packing.owners, packing.tokens)
        k, v = context.unbind(1)
        seen = attend(q, k, v, packing.conditional, pictures)
        return self.after(x, seen, changes, packing.owners)

    def before(self, x: Tensor, time: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values of self attention, and what the time changes (B, 6 C): shift, scale and gate of self
        attention, then of the feed-forward."""
        changes: Tensor = self.adaLN_modulation(time)
        shift, scale, *_ = changes.chunk(6, dim=1)
        h = plain_norm(x, BLOCK_EPS).to(x.dtype)
        return (*self.self_attn.project(h * (1 + scale[owners]) + shift[owners]), changes)

    def between(
        self, x: Tensor, seen: Tensor, changes: Tensor, owners: Tensor, conditional: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens after self attention, and the cross attention's queries (conditional, heads, D) of the first ones."""
        gate = changes.chunk(6, dim=1)[2]
        x = x + self.self_attn.to_out(seen.flatten(1)) * gate[owners]
        norm = self.norm2
        h = F.layer_norm(x[:conditional].float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)
        return x, self.cross_attn.to_q(h).unflatten(1, (self.cross_attn.heads, -1))

    def after(self, x: Tensor, seen: Tensor, changes: Tensor, owners: Tensor) -> Tensor:
        """Tokens after the block. ``seen`` has a row for each conditional token; they come first."""
        *_, shift, scale, gate = changes.chunk(6, dim=1)
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

    def project_context(self, features: Tensor) -> Tensor:
        """Keys and values (blocks, S, 2, heads, D) of a picture's features (S, C). They are the same at all steps."""
        features = features.to(self.dtype)
        return torch.stack([block.cross_attn.project_context(features) for block in self])

    def run(self, x: Tensor, time: Tensor, packing: Packing, contexts: Sequence[Tensor]) -> Tensor:
        """Tokens (T, C) after all of them, with the keys and values of each conditional sample's picture."""
        pictures = Sequences.of_equal_length(len(contexts), contexts[0].shape[1], x.device)
        for number, block in enumerate(self):
            own = [context[number] for context in contexts]
            x = block(x, time, packing, torch.cat(own) if len(own) > 1 else own[0], pictures)
        return x
