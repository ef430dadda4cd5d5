"""Diffusers' autoencoder around the kernels of `normalise`, with fewer passes over images in between."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from generation.dreamgaussian.guidance.normalise import Norm, Statistics, add, measure, normalise, normalise_back


class Kernels(NamedTuple):
    """Of a convolution with stride 1, and of the convolution that is its way back; channels last.

    Where channels are many, cuDNN has faster kernels for that than for a gradient.
    """

    there: Tensor
    back: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Kernels:
        weight = weight.detach()
        both = weight, weight.flip(-2, -1).transpose(0, 1)
        return cls(*(each.contiguous(memory_format=torch.channels_last) for each in both))


def fuse(vae: AutoencoderKL) -> None:
    """Replace what is between the convolutions of an autoencoder's encoder; results stay, up to rounding.

    The parameters are frozen by it: gradients reach the input alone. Images must have even sides at all levels. Raises
    ValueError for a block of another kind than Stable Diffusion's models have.

    Convolutions with stride 2 add a row and a column of zeros after the last, which costs a copy there and two on the
    way back. All is turned by 180 degrees instead: the image, the kernels and the latents. Then the zeros come before
    the first, where a convolution takes them into account by itself. Biases of convolutions cost no pass of their own:
    those between residual blocks are added in the next one.
    """
    encoder = vae.encoder
    for module in list(encoder.modules()):
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.flip(-2, -1)
        elif isinstance(module, Downsample2D) and module.padding == 0:
            module.padding, module.conv.padding = 1, (1, 1)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    bias: Tensor | None = _take_bias(encoder.conv_in)
    for level in [*encoder.down_blocks, encoder.mid_block]:
        for i, block in enumerate(level.resnets):
            level.resnets[i] = ResidualBlock(block, bias)
            bias = None
        for downsampler in getattr(level, "downsamplers", None) or []:
            bias = _take_bias(downsampler.conv)
    encoder.conv_norm_out, encoder.conv_act = Normalisation(encoder.conv_norm_out), nn.Identity()
    encoder.conv_in, encoder.conv_out = FirstConvolution(encoder.conv_in), nn.Sequential(encoder.conv_out, Turn())


def _take_bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    bias = convolution.bias.detach()
    convolution.bias = None
    return bias


class Turn(nn.Module):
    """By 180 degrees."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-2, -1)


class FirstConvolution(nn.Module):
    """Of the image, turned by 180 degrees, without the bias.

    Filled up to 16 channels, for cuDNN's kernels are faster with them; and channels last, or the gradient of what comes
    out, the largest there is, would be brought into the image's order and back.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.more = -plain.in_channels % 16
        self.weights = Kernels.of(F.pad(plain.weight.detach(), (0, 0, 0, 0, 0, self.more)))

    def forward(self, x: Tensor) -> Tensor:
        turned = F.pad(x.flip(-2, -1), (0, 0, 0, 0, 0, self.more)).contiguous(memory_format=torch.channels_last)
        result: Tensor = _Convolve.apply(turned, *self.weights)
        return result


class ResidualBlock(nn.Module):
    """A `ResnetBlock2D` as Stable Diffusion's autoencoder has it, of x + `bias` (C,) where there is one."""

    def __init__(self, plain: ResnetBlock2D, bias: Tensor | None = None) -> None:
        super().__init__()
        usual = {"time_embedding_norm": "default", "output_scale_factor": 1.0, "time_emb_proj": None}
        other = [name for name, value in usual.items() if getattr(plain, name) != value]
        if other or plain.up or plain.down or not isinstance(plain.nonlinearity, nn.SiLU):
            raise ValueError(f"a residual block can not be fused: {', '.join(other) or plain}")
        self.norms = _norm(plain.norm1), _norm(plain.norm2)
        self.weights = Kernels.of(plain.conv1.weight), Kernels.of(plain.conv2.weight)
        self.shortcut = None if plain.conv_shortcut is None else Kernels.of(plain.conv_shortcut.weight)
        # Added in the two normalisations, and with the shortcut.
        self.added, self.last = (bias, plain.conv1.bias.detach()), plain.conv2.bias.detach()
        if self.shortcut is not None:
            self.last = self.last + plain.conv_shortcut.bias.detach()
        if bias is not None:
            self.last = self.last + (bias if self.shortcut is None else self.shortcut.there[..., 0, 0] @ bias)

    def forward(self, x: Tensor, temb: None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        result: Tensor = _Residual.apply(x, self.added, self.norms, self.weights, self.shortcut, self.last)
        return result


class Normalisation(nn.Module):
    """Group normalisation, then SiLU."""

    def __init__(self, plain: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = _norm(plain)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Normalise.apply(x.contiguous(memory_format=torch.channels_last), self.norm)
        return result


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: tuple[Tensor | None, Tensor],
        norms: tuple[Norm, Norm],
        weights: tuple[Kernels, Kernels],
        shortcut: Kernels | None,
        last: Tensor,
    ) -> Tensor:
        outer = measure(x, norms[0], added[0])
        middle = F.conv2d(normalise(x, outer), weights[0].there, padding=1)
        inner = measure(middle, norms[1], added[1])
        result = F.conv2d(normalise(middle, inner), weights[1].there, padding=1)
        ctx.save_for_backward(x, middle, *outer, *inner)
        ctx.frozen = norms, weights, shortcut
        return add(result, x if shortcut is None else F.conv2d(x, shortcut.there), last)

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = outward
        x, middle, *statistics = ctx.saved_tensors
        norms, weights, shortcut = ctx.frozen
        inner = F.conv2d(gradient, weights[1].back, padding=1)
        inner = normalise_back(inner, middle, Statistics(*statistics[4:]), norms[1])
        outer = F.conv2d(inner, weights[0].back, padding=1)
        around = gradient if shortcut is None else F.conv2d(gradient, shortcut.back)
        return normalise_back(outer, x, Statistics(*statistics[:4]), norms[0], around), None, None, None, None, None


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return F.conv2d(x, there, padding=1)

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None]:
        return F.conv2d(outward[0], ctx.back, padding=1), None, None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        statistics = measure(x, norm)
        ctx.save_for_backward(x, *statistics)
        ctx.norm = norm
        return normalise(x, statistics)

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None]:
        x, *statistics = ctx.saved_tensors
        return normalise_back(outward[0], x, Statistics(*statistics), ctx.norm), None


def _norm(plain: nn.GroupNorm) -> Norm:
    return Norm(plain.weight.detach(), plain.bias.detach(), plain.num_groups, plain.eps)
