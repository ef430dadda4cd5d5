"""A background remover's modelling file in the manner of RMBG-2.0's: it asks tensors for values while it is built, and
makes a mask in the default type."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class MiniMattingConfig(PretrainedConfig):
    model_type = "mini_matting"

    def __init__(self, width=8, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class MiniMatting(PreTrainedModel):
    config_class = MiniMattingConfig

    def __init__(self, config):
        super().__init__(config)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]  # fails on the meta device
        self.conv = nn.Conv2d(3, config.width, 3, padding=1)
        self.head = nn.Conv2d(config.width, 1, 1)

    def forward(self, images):
        mask = torch.zeros(images.shape[-2:], device=images.device)
        fine = self.head(torch.relu(self.conv(images)) + mask)
        return [nn.functional.avg_pool2d(fine, 2), fine]
