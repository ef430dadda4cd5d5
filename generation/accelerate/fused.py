"""The encoder of diffusers' autoencoder, forward and backward, on our normalisation kernels."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from generation.accelerate.kernels.group_norm import (
    Norm,
    Statistics,
    add,
    add_with_statistics,
    compute_statistics,
    normalise,
    normalise_backward,
)
from generation.accelerate.kernels.small_group_norm import backward_small, forward_small, is_small


class ConvWeights(NamedTuple):
    """Weights (O, C, k, k) of a convolution with stride 1, and (C, O, k, k) of the convolution that is its gradient.

    Channels last. With many channels cuDNN's kernels for a convolution are faster than those for its gradient.
    """

    forward: Tensor
    backward: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> ConvWeights:
        weight = weight.detach()
        both = weight, weight.flip(-2, -1).transpose(0, 1)
        return cls(*(each.contiguous(memory_format=torch.channels_last) for each in both))


def fuse_encoder(vae: AutoencoderKL) -> None:
    """Replace an autoencoder's encoder by ``FusedEncoder``. Results are the same up to rounding.

    Parameters are frozen: only the input gets a gradient. Images must have even sides at all levels. Raises ValueError
    for a block that Stable Diffusion's autoencoder does not have. Where memory runs out in the middle, it may be called
    again.
    """
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not isinstance(vae.encoder, FusedEncoder):
        vae.encoder = FusedEncoder(copy.deepcopy(vae.encoder))  # a copy, because it takes the encoder apart


class FusedEncoder(nn.Module):
    """Images (N, C, H, W) to the moments of their latents, as diffusers' ``Encoder``.

    Before a convolution with stride 2 diffusers pads the image with zeros at the end. That costs a copy in the forward
    pass and two in the backward pass. Here the image, the kernels and the latents are rotated by 180 degrees. Then the
    zeros are at the start, where the convolution itself pads. A bias between residual blocks is added in the next
    block, which saves a pass.
    """

    def __init__(self, plain: Encoder) -> None:
        super().__init__()
        for module in plain.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.flip(-2, -1)
        parts: list[nn.Module] = []
        for level in plain.down_blocks:
            parts += [*level.resnets, *(level.downsamplers or [])]
        first, *others = plain.mid_block.resnets
        parts.append(first)
        for attention, block in zip(plain.mid_block.attentions, others, strict=True):
            parts += [block] if attention is None else [attention, block]
        bias: Tensor | None = _take_bias(plain.conv_in)
        self.first = plain.conv_in
        steps: list[nn.Module] = []
        for part, following in zip(parts, [*parts[1:], plain.conv_norm_out], strict=True):
            if isinstance(part, ResnetBlock2D):
                steps.append(ResidualBlock(part, bias, _norm_of(following)))
                bias = None
            elif isinstance(part, Downsample2D):
                bias = _take_bias(part.conv)
                part.conv.padding = (1, 1)
                steps.append(part.conv)
            else:
                steps.append(part)
        self.steps = nn.ModuleList(steps)
        self.norm_out = Normalisation(plain.conv_norm_out)
        self.conv_out = plain.conv_out

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image.flip(-2, -1).contiguous(memory_format=torch.channels_last))
        known: Statistics | None = None
        for step in self.steps:
            if isinstance(step, ResidualBlock):
                x, known = step(x, known)
            else:
                x, known = step(x), None
        result: Tensor = self.conv_out(self.norm_out(x, known)).flip(-2, -1)
        return result


def _take_bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    bias = convolution.bias.detach()
    convolution.bias = None
    return bias


def _norm_of(part: nn.Module) -> Norm | None:
    """The normalisation that ``part`` begins with, if it can take statistics computed before it. Otherwise None."""
    if isinstance(part, ResnetBlock2D):
        return _norm(part.norm1)
    return _norm(part) if isinstance(part, nn.GroupNorm) else None


def _norm(plain: nn.GroupNorm) -> Norm:
    return Norm(plain.weight.detach(), plain.bias.detach(), plain.num_groups, plain.eps)


class ResidualBlock(nn.Module):
    """A ``ResnetBlock2D`` of Stable Diffusion's autoencoder, applied to x + ``bias`` (C,) if there is one.

    Takes x (N, C, H, W) and its statistics if they are known. Returns the result, and the statistics for the
    normalisation ``following`` it, if there is one.
    """

    def __init__(self, plain: ResnetBlock2D, bias: Tensor | None = None, following: Norm | None = None) -> None:
        super().__init__()
        usual = {"time_embedding_norm": "default", "output_scale_factor": 1.0, "time_emb_proj": None}
        other = [name for name, value in usual.items() if getattr(plain, name) != value]
        if other or plain.up or plain.down or not isinstance(plain.nonlinearity, nn.SiLU):
            raise ValueError(f"a residual block can not be fused: {', '.join(other) or plain}")
        self.norms = _norm(plain.norm1), _norm(plain.norm2)
        self.following = following
        self.weights = ConvWeights.of(plain.conv1.weight), ConvWeights.of(plain.conv2.weight)
        self.shortcut = None if plain.conv_shortcut is None else ConvWeights.of(plain.conv_shortcut.weight)
        # Biases that the two normalisations add, and the one that is added with the shortcut.
        self.added, self.last = (bias, plain.conv1.bias.detach()), plain.conv2.bias.detach()
        if self.shortcut is not None:
            self.last = self.last + plain.conv_shortcut.bias.detach()
        if bias is not None:
            self.last = self.last + (bias if self.shortcut is None else self.shortcut.forward[..., 0, 0] @ bias)

    def forward(self, x: Tensor, known: Statistics | None = None) -> tuple[Tensor, Statistics | None]:
        x = x.contiguous(memory_format=torch.channels_last)
        result, *statistics = _Residual.apply(x, known, self)
        return result, Statistics(*statistics) if statistics else None


class Normalisation(nn.Module):
    """Group normalisation, then SiLU, of x (N, C, H, W), whose statistics may be known."""

    def __init__(self, plain: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = _norm(plain)

    def forward(self, x: Tensor, known: Statistics | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        result: Tensor = _Normalise.apply(x, known, self.norm)
        return result


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, known: Statistics | None, block: ResidualBlock) -> tuple[Tensor, ...]:
        first, second = block.weights
        normalised, outer = _forward(x, block.norms[0], block.added[0], known)
        middle = F.conv2d(normalised, first.forward, padding=1)
        normalised, inner = _forward(middle, block.norms[1], block.added[1])
        result = F.conv2d(normalised, second.forward, padding=1)
        ctx.save_for_backward(x, middle, *outer, *inner)
        ctx.block = block
        ctx.set_materialize_grads(False)
        residual = x if block.shortcut is None else F.conv2d(x, block.shortcut.forward)
        if block.following is None or is_small(result):
            return (add(result, residual, block.last),)
        total, statistics = add_with_statistics(result, residual, block.last, block.following)
        ctx.mark_non_differentiable(*statistics)
        return total, *statistics

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor | None, ...]:
        gradient, block = outward[0], ctx.block
        x, middle, *statistics = ctx.saved_tensors
        first, second = block.weights
        inner = F.conv2d(gradient, second.backward, padding=1)
        inner = _backward(inner, middle, Statistics(*statistics[4:]), block.norms[1])
        outer = F.conv2d(inner, first.backward, padding=1)
        residual = gradient if block.shortcut is None else F.conv2d(gradient, block.shortcut.backward)
        return _backward(outer, x, Statistics(*statistics[:4]), block.norms[0], residual), None, None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, known: Statistics | None, norm: Norm) -> Tensor:
        result, statistics = _forward(x, norm, None, known)
        ctx.save_for_backward(x, *statistics)
        ctx.norm = norm
        return result

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None]:
        x, *statistics = ctx.saved_tensors
        return _backward(outward[0], x, Statistics(*statistics), ctx.norm), None, None


def _forward(x: Tensor, norm: Norm, added: Tensor | None, known: Statistics | None = None) -> tuple[Tensor, Statistics]:
    """SiLU of the normalised x + ``added`` (C,), and the statistics of x, which may be ``known`` already."""
    if known is None and is_small(x):
        return forward_small(x, norm, added)
    statistics = known or compute_statistics(x, norm, added)
    return normalise(x, statistics), statistics


def _backward(
    gradient: Tensor, x: Tensor, statistics: Statistics, norm: Norm, residual: Tensor | None = None
) -> Tensor:
    return (backward_small if is_small(x) else normalise_backward)(gradient, x, statistics, norm, residual)
