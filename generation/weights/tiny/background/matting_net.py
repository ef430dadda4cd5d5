"""The pack's background removal: a small U-Net that loads and answers as RMBG-2.0 and BiRefNet do.

This file is copied beside its weights: like theirs, the class is fetched from the model's folder (`auto_map` in
config.json), built, and filled from model.safetensors; its output is a list whose last entry is the finest logit map.
"""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# ImageNet statistics, which images are normalised with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHITE = 0.95  # light of a border from which on it counts as white


class MattingConfig(PretrainedConfig):
    model_type = "tiny_matting"

    def __init__(self, widths=(16, 32, 64, 96), **kwargs):
        self.widths = list(widths)
        super().__init__(**kwargs)


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
    )


class MattingNet(PreTrainedModel):
    config_class = MattingConfig

    def __init__(self, config: MattingConfig):
        super().__init__(config)
        w = config.widths
        self.down = nn.ModuleList(
            [_block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(zip([3, *w], w, strict=False))]
        )
        self.up = nn.ModuleList([_block(a + b, b) for a, b in zip(w[:0:-1], w[-2::-1], strict=True)])
        self.head = nn.ModuleList([nn.Conv2d(c, 1, 1) for c in w[-2::-1]])
        self.post_init()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Normalised images (B, 3, H, W), sides multiples of 8 -> logits, coarse to fine, the last (B, 1, H, W).

        It learned on grey most of all. So what comes on white is looked at in half its light, too.
        """
        logits = self._logits(images)
        if self.training:
            return logits
        mean, std = (images.new_tensor(each).view(3, 1, 1) for each in (MEAN, STD))
        light = images * std + mean
        border = torch.cat([light[..., 0, :], light[..., -1, :], light[..., 0], light[..., -1]], -1)
        on_white = border.float().median(-1).values.amin(1) > WHITE
        if on_white.any():
            dimmed = self._logits((light[on_white] / 2 - mean) / std)
            for each, other in zip(logits, dimmed, strict=True):
                each[on_white] = (each[on_white] + other) / 2
        return logits

    def _logits(self, images: torch.Tensor) -> list[torch.Tensor]:
        skips = []
        x = images
        for block in self.down:
            x = block(x)
            skips.append(x)
        skips.pop()
        logits = []
        for block, head in zip(self.up, self.head, strict=True):
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skips.pop()], 1))
            logits.append(head(x))
        return logits
