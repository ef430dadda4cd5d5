"""Rewrites diffusers' UNet to launch fewer and larger kernels, and compiles its transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from generation.accelerate.compiled import compile_blocks
from generation.accelerate.group_norm import FusedGroupNorm


def compile_unet(unet: UNet2DConditionModel) -> None:
    """Rewrite a UNet to launch fewer kernels. Results are the same up to rounding.

    Its transformers are compiled at their first call, for each batch size. Afterwards it has no backward pass. Where
    memory runs out in the middle, it may be called again.
    """
    _join_projections(unet)
    for module in list(unet.modules()):
        for name, child in module.named_children():
            if isinstance(child, ResnetBlock2D) and _is_usual(child):
                setattr(module, name, ResidualBlock(child))
            elif isinstance(child, nn.GroupNorm) and isinstance(module, Transformer2DModel):
                setattr(module, name, FusedGroupNorm(child))
    blocks = [each for each in unet.modules() if isinstance(each, ResidualBlock) and hasattr(each, "projection")]
    if blocks:
        unet.time_embed_act = TimeProjections(unet.time_embed_act, blocks)
    _take_biases_of_upsampling(unet)
    if isinstance(unet.conv_norm_out, nn.GroupNorm) and isinstance(unet.conv_act, nn.SiLU):
        unet.conv_norm_out, unet.conv_act = FusedGroupNorm(unet.conv_norm_out, silu=True), nn.Identity()
    for module in unet.modules():
        if isinstance(module, Transformer2DModel) and _keep_channels_last not in module._forward_hooks.values():
            module.register_forward_hook(_keep_channels_last)
    compile_blocks(unet, (ResnetBlock2D, Transformer2DModel))


class ResidualBlock(nn.Module):
    """A ``ResnetBlock2D`` of Stable Diffusion's UNet.

    ``TimeProjections`` sets ``time``, the projection of the time step plus the first convolution's bias.
    """

    time: Tensor  # (N, C)

    def __init__(self, plain: ResnetBlock2D) -> None:
        super().__init__()
        self.norms = nn.ModuleList([FusedGroupNorm(plain.norm1, silu=True), FusedGroupNorm(plain.norm2, silu=True)])
        self.convolutions = nn.ModuleList([plain.conv1, plain.conv2])
        self.shortcut = plain.conv_shortcut
        self.projection = plain.time_emb_proj.weight.detach()
        self.projection_bias = plain.time_emb_proj.bias.detach() + plain.conv1.bias.detach()
        self.last = plain.conv2.bias.detach()
        if self.shortcut is not None and self.shortcut.bias is not None:
            self.last = self.last + self.shortcut.bias.detach()
        for convolution in (*self.convolutions, self.shortcut):
            if convolution is not None:
                convolution.bias = None
        self.bias: Tensor | None = None  # (C,) of x
        self._channels = plain.in_channels

    def take_bias(self, bias: Tensor) -> None:
        """From now on add ``bias`` to the first channels of x, because the layer before leaves it out."""
        added = F.pad(bias, (0, self._channels - len(bias)))
        residual = added if self.shortcut is None else self.shortcut.weight.detach()[..., 0, 0] @ added
        self.bias, self.last = added, self.last + residual

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """x (N, C, H, W), channels last. ``temb`` is unused, because ``time`` was set before."""
        first, second = self.convolutions
        middle = first(self.norms[0](x, self.bias))
        result = second(self.norms[1](middle, self.time))
        residual = x if self.shortcut is None else self.shortcut(x)
        if not x.is_cuda:
            return residual + result + self.last.view(1, -1, 1, 1)
        from generation.accelerate.kernels.group_norm import add  # Triton comes with torch for GPUs

        return add(result, residual.contiguous(memory_format=torch.channels_last), self.last)


class TimeProjections(nn.Module):
    """The time projections of all ``blocks`` in one matrix product, because each is tiny. Sets each block's ``time``.

    Replaces ``before``, the activation of the UNet's time embedding, and applies it first.
    """

    def __init__(self, before: nn.Module | None, blocks: list[ResidualBlock]) -> None:
        super().__init__()
        self.before = before
        self._blocks = blocks  # a plain list: they are not submodules of this one
        self.weight = nn.Parameter(torch.cat([block.projection for block in blocks]), requires_grad=False)
        self.bias = torch.cat([block.projection_bias for block in blocks])
        self._widths = [len(block.projection) for block in blocks]
        for block in blocks:
            del block.projection, block.projection_bias

    def forward(self, emb: Tensor) -> Tensor:
        emb = emb if self.before is None else self.before(emb)
        together = F.linear(F.silu(emb), self.weight, self.bias)
        for block, part in zip(self._blocks, together.split(self._widths, 1), strict=True):
            block.time = part
        return emb


class TextProjections:
    """The text's keys and values of all cross-attention ``layers`` in one matrix product. A forward pre-hook of a UNet.

    Where image tokens follow the text's, ``to_k_ip`` and ``to_v_ip`` project those.
    """

    def __init__(self, layers: list[Attention]) -> None:
        self._weight = torch.cat([layer.to_kv.weight.detach() for layer in layers])
        self._image_tokens = getattr(layers[0].processor, "image_tokens", 0)
        if self._image_tokens:
            image_layers = [each.weight.detach() for layer in layers for each in (layer.to_k_ip, layer.to_v_ip)]
            self._image_weight = torch.cat(image_layers)
        self._widths = [layer.to_kv.out_features for layer in layers]
        self._results = [_Precomputed() for _ in layers]
        for layer, result in zip(layers, self._results, strict=True):
            layer.to_kv = result
            if self._image_tokens:
                layer.to_k_ip = layer.to_v_ip = None

    def __call__(self, unet: nn.Module, args: tuple[Tensor, ...]) -> None:
        """``args[2]`` are the text states (N, L, C)."""
        if self._image_tokens:
            text, picture = args[2][:, : -self._image_tokens], args[2][:, -self._image_tokens :]
            together = torch.cat([F.linear(text, self._weight), F.linear(picture, self._image_weight)], 1)
        else:
            together = F.linear(args[2], self._weight)
        for result, part in zip(self._results, together.split(self._widths, -1), strict=True):
            result.value = part


class _Precomputed(nn.Module):
    """Replaces a layer by its precomputed result. An attribute, because layers that are alike share compiled code."""

    value: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def _take_biases_of_upsampling(unet: UNet2DConditionModel) -> None:
    """Have the residual block after an upsampling add the bias of its convolution, which saves a pass."""
    for level, following in zip(unet.up_blocks, unet.up_blocks[1:], strict=False):
        upsampler, block = (level.upsamplers or [None])[0], following.resnets[0]
        takes = isinstance(upsampler, Upsample2D) and upsampler.use_conv and isinstance(block, ResidualBlock)
        if takes and upsampler.conv.bias is not None:
            block.take_bias(upsampler.conv.bias.detach())
            upsampler.conv.bias = None


def _is_usual(block: ResnetBlock2D) -> bool:
    usual = {"time_embedding_norm": "default", "output_scale_factor": 1.0, "skip_time_act": False}
    return (
        all(getattr(block, name) == value for name, value in usual.items())
        and block.time_emb_proj is not None
        and not (block.up or block.down)
        and isinstance(block.nonlinearity, nn.SiLU)
    )


def _join_projections(unet: UNet2DConditionModel) -> None:
    """Join the products for queries, keys and values, and those of the text for all layers.

    Each alone is too small to keep a large GPU busy.
    """
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        if not layer.fused_projections:
            layer.fuse_projections()
        for name in ("to_k", "to_v") if layer.is_cross_attention else ("to_q", "to_k", "to_v"):
            setattr(layer, name, None)  # diffusers would keep both
    cross_attentions = [
        each
        for each in layers
        if each.is_cross_attention
        and not each.norm_cross
        and isinstance(each.to_kv, nn.Linear)
        and each.to_kv.bias is None
    ]
    if cross_attentions:
        unet.register_forward_pre_hook(TextProjections(cross_attentions))
    processors = unet.attn_processors
    for name, processor in processors.items():
        if hasattr(processor, "attend"):  # an attention processor of ours, such as MultiViewAttention
            processor.attend = FusedAttnProcessor2_0()
        else:
            processors[name] = FusedAttnProcessor2_0()
    unet.set_attn_processor(processors)


def _keep_channels_last(module: nn.Module, inputs: object, outputs: tuple[Tensor]) -> tuple[Tensor]:
    """Diffusers' transformers return channels-first images, which the next convolution would have to copy."""
    (image,) = outputs
    return (image.contiguous(memory_format=torch.channels_last),)
