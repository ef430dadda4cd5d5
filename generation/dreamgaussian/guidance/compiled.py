"""Diffusers' convolutional models in the form of which torch.compile makes the fastest kernels."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from generation.dreamgaussian.guidance.multiview import MultiViewAttention


class ChannelwiseGroupNorm(nn.Module):
    """Group normalisation from sums for each channel.

    With channels last, the pixels' channels are neighbours in memory: sums over pixels read all of it in order, where
    sums over the few channels of a group, as compilers write them, read a quarter of each memory sector. Measured on an
    H100, the UNet's step for four scenes: 17.6 ms with the plain form, 17.0 ms with this one.
    """

    def __init__(self, plain: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = plain.num_groups, plain.eps, plain.weight, plain.bias

    def forward(self, x: Tensor) -> Tensor:
        (n, c), pixels = x.shape[:2], tuple(range(2, x.ndim))
        wide = x.float()
        means, squares = wide.mean(pixels), wide.square().mean(pixels)  # of each channel
        mean = means.view(n, self.groups, -1).mean(-1)
        variance = squares.view(n, self.groups, -1).mean(-1) - mean.square()
        each = c // self.groups
        scale = (variance.clamp_min(0) + self.eps).rsqrt().repeat_interleave(each, 1) * self.weight.float()
        shift = self.bias.float() - mean.repeat_interleave(each, 1) * scale
        channels = (n, c) + (1,) * len(pixels)
        return (wide * scale.view(channels) + shift.view(channels)).to(x.dtype)


def compile_regions(model: nn.Module) -> None:
    """Bring a UNet or an autoencoder into the form of which a compiler makes the fastest kernels, and let it, at the
    first call; results stay, up to rounding.

    Residual blocks and transformers are compiled one by one, and those alike share what was made: compiling a whole
    UNet took two minutes for each batch size, and gains nothing more in a CUDA graph.
    """
    torch._dynamo.config.recompile_limit = 128  # of a block's code: for each of its widths and sizes
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, ChannelwiseGroupNorm(child))
    regions: tuple[type[nn.Module], ...] = (ResnetBlock2D, Transformer2DModel)
    if isinstance(model, AutoencoderKL):
        # One head of 512 channels: the fused kernels' way back takes ten times what plain products take.
        model.set_attn_processor(AttnProcessor())
        regions = (ResnetBlock2D, Attention)
    elif isinstance(model, UNet2DConditionModel):
        _join_projections(model)
    for module in model.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_hook(_keep_channels_last)
        if isinstance(module, regions):
            module.compile(fullgraph=True, dynamic=False)


def _join_projections(unet: UNet2DConditionModel) -> None:
    """Queries, keys and values in one product: each is too small to keep a large GPU busy."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
    processors = unet.attn_processors
    for name, processor in processors.items():
        if isinstance(processor, MultiViewAttention):
            processor.attend = FusedAttnProcessor2_0()
        else:
            processors[name] = FusedAttnProcessor2_0()
    unet.set_attn_processor(processors)


def _keep_channels_last(module: nn.Module, inputs: object, outputs: tuple[Tensor]) -> tuple[Tensor]:
    """Diffusers' transformers return images in the other order: the next convolutions would copy them."""
    (image,) = outputs
    return (image.contiguous(memory_format=torch.channels_last),)
