"""Attention that turns a diffusers UNet into a multi-view one.

Over views: Shi et al. 2023, "MVDream", https://arxiv.org/abs/2308.16512. To a picture's tokens: Wang and Shi 2023,
"ImageDream", https://arxiv.org/abs/2312.02201.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0


class MultiViewAttention:
    """Attention over all views of a scene as one sequence: ((s v), l, c) -> (s, (v l), c).

    All layers of a UNet share one instance, so `views` is set in one place.
    """

    def __init__(self, views: int = 4):
        self.views = views
        self.attend: AttnProcessor2_0 | FusedAttnProcessor2_0 = AttnProcessor2_0()

    def __call__(self, attn, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        shape = hidden_states.shape
        joined = hidden_states.reshape(shape[0] // self.views, self.views * shape[1], shape[2])
        return self.attend(attn, joined, *args, **kwargs).reshape(shape)


class ImagePromptAttention(MultiViewAttention):
    """Decoupled cross attention of all views of a scene to its text and to its picture; the results are added.

    A layer's `to_k_ip` and `to_v_ip` project the picture's `image_tokens`, which follow the text states.
    """

    def __init__(self, views: int, image_tokens: int):
        super().__init__(views)
        self.image_tokens = image_tokens

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args, **kwargs
    ) -> torch.Tensor:
        shape = hidden_states.shape
        length = encoder_hidden_states.shape[1] - self.image_tokens
        if attn.fused_projections:
            keys, values = attn.to_kv(encoder_hidden_states).chunk(2, -1)
        else:
            words, picture = encoder_hidden_states[:, :length], encoder_hidden_states[:, length:]
            keys = torch.cat([attn.to_k(words), attn.to_k_ip(picture)], 1)
            values = torch.cat([attn.to_v(words), attn.to_v_ip(picture)], 1)
        joined = hidden_states.reshape(shape[0] // self.views, self.views * shape[1], shape[2])
        query = attn.to_q(joined).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        keys = keys.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        values = values.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        of_words = F.scaled_dot_product_attention(query, keys[:, :, :length], values[:, :, :length])
        of_picture = F.scaled_dot_product_attention(query, keys[:, :, length:], values[:, :, length:])
        result = attn.to_out[0]((of_words + of_picture).transpose(1, 2).flatten(2))
        return attn.to_out[1](result).reshape(shape)


def join_views(
    unet: UNet2DConditionModel, views: int = 4, shared_text: bool = False, image_tokens: int = 0
) -> MultiViewAttention:
    """Make every self-attention of `unet` (diffusers' attn1) multi-view. Returns the instance that they share.

    With `shared_text`, or with `image_tokens`, cross attention is multi-view, too. Then text states are passed once per
    scene and not once per view.
    """
    joint = MultiViewAttention(views)
    others = joint if shared_text else None
    if image_tokens:
        others = ImagePromptAttention(views, image_tokens)
    unet.set_attn_processor(
        {name: joint if ".attn1." in name else others or processor for name, processor in unet.attn_processors.items()}
    )
    return joint


def camera_embedding(camera_to_world: torch.Tensor, front_azimuth: float = 0.0) -> torch.Tensor:
    """MVDream's camera condition (C, 16) of OpenGL camera-to-world matrices (C, 4, 4) in a y-up world.

    The matrix in Blender's axes (z up, front to -y), its position scaled to length one, flattened by rows.
    `front_azimuth` (degrees) is where the camera stood that saw the front in training; here it stands at 0.
    """
    angle = math.radians(front_azimuth)
    x, y, z, last = camera_to_world.unbind(1)  # the matrix's rows
    x, z = math.cos(angle) * x + math.sin(angle) * z, math.cos(angle) * z - math.sin(angle) * x
    m = torch.stack([x, -z, y, last], 1)
    return torch.cat([m[:, :, :3], torch.cat([F.normalize(m[:, :3, 3:], dim=1), m[:, 3:, 3:]], 1)], 2).flatten(1)
