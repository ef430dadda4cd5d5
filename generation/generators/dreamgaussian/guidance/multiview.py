"""What makes a diffusers UNet a multi-view one (Shi et al. 2023, "MVDream", https://arxiv.org/abs/2308.16512)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0


class MultiViewAttention:
    """Attention in which the views of one scene are one sequence, and attend to each other: ((s v), l, c) ->
    (s, (v l), c).

    One instance serves all layers of a UNet, so `views` is set in one place.
    """

    def __init__(self, views: int = 4):
        self.views = views
        self.attend: AttnProcessor2_0 | FusedAttnProcessor2_0 = AttnProcessor2_0()

    def __call__(self, attn, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        shape = hidden_states.shape
        joined = hidden_states.reshape(shape[0] // self.views, self.views * shape[1], shape[2])
        return self.attend(attn, joined, *args, **kwargs).reshape(shape)


def join_views(unet: UNet2DConditionModel, views: int = 4, shared_text: bool = False) -> MultiViewAttention:
    """Give every self-attention of `unet` (diffusers calls it attn1) the multi-view form; returns what they share.

    With `shared_text` the attention to the text has it, too: text states then come once for each scene, for all of its
    views.
    """
    joint = MultiViewAttention(views)
    unet.set_attn_processor(
        {
            name: joint if shared_text or ".attn1." in name else processor
            for name, processor in unet.attn_processors.items()
        }
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
