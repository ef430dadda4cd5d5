"""Rewrites diffusers' autoencoder for torch.compile: channels last, fused upsampling, compiled blocks; UNets, too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class ChannelwiseGroupNorm(nn.Module):
    """Group normalisation from each channel's mean and variance.

    With channels last the channels of a pixel are neighbours in memory. A reduction over pixels reads memory in order.
    A reduction over the few channels of a group, as compilers write it, uses a quarter of each memory sector.
    """

    def __init__(self, plain: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = plain.num_groups, plain.eps, plain.weight, plain.bias

    def forward(self, x: Tensor) -> Tensor:
        (n, c), pixels = x.shape[:2], tuple(range(2, x.ndim))
        wide = x.float()
        variances, means = torch.var_mean(wide, pixels, correction=0)  # of each channel
        within = variances.view(n, self.groups, -1).mean(-1)
        between, mean = torch.var_mean(means.view(n, self.groups, -1), -1, correction=0)
        each = c // self.groups
        scale = (within + between + self.eps).rsqrt().repeat_interleave(each, 1) * self.weight.float()
        shift = self.bias.float() - mean.repeat_interleave(each, 1) * scale
        channels = (n, c) + (1,) * len(pixels)
        return (wide * scale.view(channels) + shift.view(channels)).to(x.dtype)


class FusedUpsample(nn.Module):
    """Nearest upsampling by 2 and a 3x3 convolution, as one transposed convolution with stride 2.

    Of the nine pixels under the 3x3 kernel only four differ. So four products are enough.
    """

    def __init__(self, plain: Upsample2D) -> None:
        super().__init__()
        weight = plain.conv.weight.detach()
        # (C, O, 4, 4): a pixel contributes to its own four pixels and to their neighbours. Summed in 32 bits.
        wide = weight.new_zeros(*weight.shape[1::-1], 4, 4, dtype=torch.float32)
        for x in (0, 1):
            for y in (0, 1):
                wide[..., y : y + 3, x : x + 3] += weight.transpose(0, 1).flip(-2, -1)
        kernel = wide.to(weight.dtype, memory_format=torch.channels_last)
        self.kernel = nn.Parameter(kernel, requires_grad=False)
        self.bias = plain.conv.bias

    def forward(self, x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """``output_size`` must be None, as it is unless a side is odd at some level. Raises ValueError."""
        if output_size is not None:
            raise ValueError(f"upsampling to {tuple(output_size)}: a compiled model has even sides at all levels")
        return F.conv_transpose2d(x, self.kernel, self.bias, stride=2, padding=1)


def compile_autoencoder(vae: AutoencoderKL, any_batch: bool = False) -> None:
    """Rewrite an autoencoder and compile its blocks at their first call. Results are the same up to rounding.

    It is compiled for each batch size, or with ``any_batch`` once for one image and once for any larger batch.
    """
    for module in list(vae.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, ChannelwiseGroupNorm(child))
    # With one head of 512 channels the backward pass of fused attention takes ten times as long as plain products.
    vae.set_attn_processor(AttnProcessor())
    compile_blocks(vae, (ResnetBlock2D, Attention), any_batch)


def compile_blocks(model: nn.Module, block_types: tuple[type[nn.Module], ...], any_batch: bool = False) -> None:
    """Make ``model`` channels last, fuse its upsampling, and compile each block of these types by itself.

    Blocks that are alike share the compiled code. Compiling a whole UNet took two minutes for each batch size, and
    gains nothing more in a CUDA graph. ``any_batch``: see ``compile_autoencoder``.
    """
    torch._dynamo.config.recompile_limit = 128  # one variant for each width and size of a block
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Upsample2D) and child.use_conv:
                setattr(module, name, FusedUpsample(child))
        if isinstance(module, block_types):
            module.compile(fullgraph=True, dynamic=None if any_batch else False)
