"""Diffusers' UNet with fewer and larger kernels, its transformers compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from generation.accelerate.compiled import compile_parts
from generation.accelerate.group_norm import ImageNorm


def compile_unet(unet: UNet2DConditionModel) -> None:
    """Bring a UNet into a form that needs few kernels. Results stay, up to rounding.

    Its transformers are compiled at their first call, for each batch size. No gradient can be taken through it then.
    """
    _join_projections(unet)
    blocks = []
    for module in list(unet.modules()):
        for name, child in module.named_children():
            if isinstance(child, ResnetBlock2D) and _is_usual(child):
                blocks.append(ResidualBlock(child))
                setattr(module, name, blocks[-1])
            elif isinstance(child, nn.GroupNorm) and isinstance(module, Transformer2DModel):
                setattr(module, name, ImageNorm(child))
    if blocks:
        unet.time_embed_act = TimeProjections(unet.time_embed_act, blocks)
    _take_biases_of_upsampling(unet)
    if isinstance(unet.conv_norm_out, nn.GroupNorm) and isinstance(unet.conv_act, nn.SiLU):
        unet.conv_norm_out, unet.conv_act = ImageNorm(unet.conv_norm_out, silu=True), nn.Identity()
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_hook(_keep_channels_last)
    compile_parts(unet, (ResnetBlock2D, Transformer2DModel))


class ResidualBlock(nn.Module):
    """A `ResnetBlock2D` as Stable Diffusion's UNet has it.

    What it adds for the time step is set from outside, the first convolution's bias in it.
    """

    time: Tensor  # (N, C)

    def __init__(self, plain: ResnetBlock2D) -> None:
        super().__init__()
        self.norms = nn.ModuleList([ImageNorm(plain.norm1, silu=True), ImageNorm(plain.norm2, silu=True)])
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
        """From now on x is without `bias`, which belongs to its first channels."""
        self.bias = F.pad(bias, (0, self._channels - len(bias)))
        around = self.bias if self.shortcut is None else self.shortcut.weight.detach()[..., 0, 0] @ self.bias
        self.last = self.last + around

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Of x (N, C, H, W), channels last. What is made of the time step was set before: `temb` is not looked at."""
        first, second = self.convolutions
        middle = first(self.norms[0](x, self.bias))
        result = second(self.norms[1](middle, self.time))
        around = x if self.shortcut is None else self.shortcut(x)
        if not x.is_cuda:
            return around + result + self.last.view(1, -1, 1, 1)
        from generation.accelerate.kernels.normalise import add  # Triton comes with torch for GPUs

        return add(result, around.contiguous(memory_format=torch.channels_last), self.last)


class TimeProjections(nn.Module):
    """What each of `blocks` makes of the time step, of all in one product, for they are tiny; then they are told.

    Stands where a UNet has the last function of the time step's embedding, after `before`.
    """

    def __init__(self, before: nn.Module | None, blocks: list[ResidualBlock]) -> None:
        super().__init__()
        self.before = before
        self._blocks = blocks  # in a list: they are not this one's parts
        self.weight = torch.cat([block.projection for block in blocks])
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
    """Keys and values that `layers` make of the text, of all layers in one product; then they are given theirs.

    Where a picture's tokens follow the text's, their layers `to_k_ip` and `to_v_ip` are for those. A hook that a UNet
    calls before it begins.
    """

    def __init__(self, layers: list[Attention]) -> None:
        self._weight = torch.cat([layer.to_kv.weight.detach() for layer in layers])
        self._image_tokens = getattr(layers[0].processor, "image_tokens", 0)
        if self._image_tokens:
            of_picture = [each.weight.detach() for layer in layers for each in (layer.to_k_ip, layer.to_v_ip)]
            self._of_picture = torch.cat(of_picture)
        self._widths = [layer.to_kv.out_features for layer in layers]
        self._given = [_Given() for _ in layers]
        for layer, given in zip(layers, self._given, strict=True):
            layer.to_kv = given

    def __call__(self, unet: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The text is the third argument."""
        if self._image_tokens:
            text, picture = args[2][:, : -self._image_tokens], args[2][:, -self._image_tokens :]
            together = torch.cat([F.linear(text, self._weight), F.linear(picture, self._of_picture)], 1)
        else:
            together = F.linear(args[2], self._weight)
        for given, part in zip(self._given, together.split(self._widths, -1), strict=True):
            given.value = part


class _Given(nn.Module):
    """In place of a layer, what was made before in its place: a tensor that it has, for layers alike share what is
    compiled."""

    value: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def _take_biases_of_upsampling(unet: UNet2DConditionModel) -> None:
    """Biases of convolutions after upsampling cost a pass each: the residual block that follows can add them."""
    for level, following in zip(unet.up_blocks, unet.up_blocks[1:], strict=False):
        upsampler, block = (level.upsamplers or [None])[0], following.resnets[0]
        if isinstance(upsampler, Upsample2D) and upsampler.use_conv and isinstance(block, ResidualBlock):
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
    """Queries, keys and values in one product, and those of the text for all layers: each is too small to keep a large
    GPU busy."""
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.fuse_projections()
    of_text = [each for each in layers if each.is_cross_attention and not each.norm_cross and each.to_kv.bias is None]
    if of_text:
        unet.register_forward_pre_hook(TextProjections(of_text))
    processors = unet.attn_processors
    for name, processor in processors.items():
        if hasattr(processor, "attend"):  # one that attends in its own form, such as all views together
            processor.attend = FusedAttnProcessor2_0()
        else:
            processors[name] = FusedAttnProcessor2_0()
    unet.set_attn_processor(processors)


def _keep_channels_last(module: nn.Module, inputs: object, outputs: tuple[Tensor]) -> tuple[Tensor]:
    """Diffusers' transformers return images in the other order: the next convolutions would copy them."""
    (image,) = outputs
    return (image.contiguous(memory_format=torch.channels_last),)
