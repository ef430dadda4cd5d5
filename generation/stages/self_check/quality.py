"""The learned image quality that three quarters of a validator's final score are made of: DINOv2 (Oquab et al., 2023,
arXiv:2304.07193) with one linear layer on its class token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from generation.weights.registry import WeightsError

WEIGHTS = "quality_scorer.safetensors"
#: the config of facebook/dinov2-small at 150c8e7bb7cef2d30ec31b13a517af14840ee3f7; its weights are in the file above
DINOV2_SMALL: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu",
    "image_size": 518, "patch_size": 14, "num_channels": 3, "qkv_bias": True, "layerscale_value": 1.0,
    "layer_norm_eps": 1e-6, "use_swiglu_ffn": False,
}  # fmt: skip
# ImageNet statistics, which DINOv2 was trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class QualityNet(nn.Module):
    """Pictures to the logit of their quality."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: Dinov2Config, backbone: Dinov2Model | None = None) -> None:
        super().__init__()
        self.backbone = Dinov2Model(config) if backbone is None else backbone
        self.score_head = nn.Linear(config.hidden_size, 1)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,) of images (B, 3, S, S) in 0..1, with S the config's ``image_size``."""
        tokens = self.backbone((images - self.mean) / self.std).last_hidden_state
        return self.score_head(tokens[:, 0]).squeeze(1)

    @classmethod
    def load(cls, folder: Path) -> QualityNet:
        """The net of ``quality_scorer.safetensors`` in float32: with ``emb_head.*`` left out.

        The config is the folder's ``config.json``, or DINOv2-small's where there is none.
        Raises WeightsError when the weights are not exactly the config's.
        """
        try:
            config = Dinov2Config(**DINOV2_SMALL)
            if (folder / "config.json").is_file():
                config = Dinov2Config.from_pretrained(folder, local_files_only=True)
            state = load_file(folder / WEIGHTS)
            parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "score_head": {}, "emb_head": {}}
            for key, value in state.items():
                part, _, name = key.partition(".")
                parts[part][name] = value.float()
            parts["backbone"].setdefault("embeddings.mask_token", torch.zeros(1, config.hidden_size))  # of training
            # By the class's own loader, because names inside of it have changed since the file was written.
            backbone, about = Dinov2Model.from_pretrained(
                None, config=config, state_dict=parts["backbone"], dtype=torch.float32, output_loading_info=True
            )
            net = cls(config, backbone)
            net.score_head.load_state_dict(parts["score_head"], strict=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise WeightsError(f"{folder}: not a usable quality model: {error}") from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, about[what])):
                raise WeightsError(f"{folder}: not the weights of its DINOv2: {what}: {', '.join(names[:5])}")
        return net.eval().requires_grad_(False)


class Quality:
    """A loaded quality model, asked as the validators ask it."""

    def __init__(self, net: QualityNet, device: str) -> None:
        self.net = net.to(device)
        self._device = device
        self._size = net.backbone.config.image_size

    @torch.no_grad()
    def score(self, views: Tensor) -> Tensor:
        """Quality in 0..1, (B,) float32, of views (B, 3, H, W) in 0..1; a splat's is the mean over its views.

        Views of another size than the net's are brought to it, bilinear; the validators' are of its size.
        """
        views = views.to(self._device, torch.float32)
        if views.shape[-2:] != (self._size, self._size):
            views = F.interpolate(
                views, size=(self._size, self._size), mode="bilinear", align_corners=False, antialias=True
            )
        return self.net(views).sigmoid()
