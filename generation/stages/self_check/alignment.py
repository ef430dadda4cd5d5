"""Alignment of views with their prompt, by the validators' CLIP models: one for texts, one for pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from generation.accelerate.offload import Offloaded
from generation.accelerate.pinned import copy_async
from generation.accelerate.text_cache import TextCache, truncation
from generation.schema.options import ModelChoice
from generation.stages.self_check.outliers import drop_outliers, geometric_mean
from generation.weights.registry import ClipUse, WeightsError

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_TOWER = ("vision_model.", "visual_projection.")


class _Clip:
    """What both models share. With ``offload`` the model is on the device only while it runs.

    On a GPU pixels are float16 from the start, as in the validators' code, whose cosines have float16 precision.
    """

    def __init__(self, model: nn.Module, use: ClipUse, own: dict[str, Any], device: str, offload: bool) -> None:
        size = own["size"] if isinstance(own["size"], int) else own["size"][0]
        self._device, self._on_gpu = device, torch.device(device).type == "cuda"
        self._dtype = torch.float16 if self._on_gpu else torch.float32
        self._size = use.image_size or size
        self._mean = torch.tensor(use.mean or own["mean"], device=device, dtype=self._dtype).view(1, 3, 1, 1)
        self._std = torch.tensor(use.std or own["std"], device=device, dtype=self._dtype).view(1, 3, 1, 1)
        self._offloaded = Offloaded(model, device) if offload else None
        if self._offloaded:
            self._offloaded.offload()
        self.use = use

    def _pixels(self, images: Tensor) -> Tensor:
        images = images.to(self._device, torch.float32).to(self._dtype)
        if images.shape[-2:] != (self._size, self._size):
            images = F.interpolate(images, size=(self._size, self._size), mode="bicubic", align_corners=False)
        return (images - self._mean) / self._std

    def _on_device(self) -> Any:
        return self._offloaded.on_device() if self._offloaded else nullcontext()


class TextClip(_Clip):
    """An open_clip model for text prompts. It serves for image prompts, too, if there is no ``ImageClip``."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        use: ClipUse,
        device: str,
        offload: bool = False,
    ) -> None:
        super().__init__(model, use, open_clip.get_model_preprocess_cfg(model), device, offload)
        self._model, self._tokenizer = model, tokenizer
        self._texts = TextCache(self._encode)

    @classmethod
    def load(
        cls, folder: Path, choice: ModelChoice, use: ClipUse | None, device: str, offload: bool = False
    ) -> TextClip:
        """From an open_clip folder (``open_clip_config.json``, a checkpoint, tokenizer files). Raises WeightsError."""
        if use is None:
            raise WeightsError(f"{folder}: a CLIP model's card must say its cosine_scale")
        name = f"local-dir:{folder}"
        try:
            model = open_clip.create_model_from_pretrained(
                name, precision=_PRECISIONS[choice.dtype], device="cpu" if offload else device, return_transform=False
            )
            tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise WeightsError(f"{folder}: not a usable open_clip model: {error}") from error
        return cls(model.eval().requires_grad_(False), tokenizer, use, device, offload)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """The unit vector (D,) of each."""
        return self._texts.encode(texts)

    def truncation(self, text: str) -> tuple[int, int] | None:
        """(tokens that are read, tokens of the text) if the text is truncated, else None."""
        return truncation(self._tokenizer, text)

    def embed(self, images: Tensor) -> Tensor:
        """The unit vectors (B, D) of images (B, 3, H, W) in 0..1."""
        pixels = self._pixels(images)
        with self._on_device(), self._autocast():
            return _unit(self._model.encode_image(pixels))  # type: ignore[operator]

    def _encode(self, texts: list[str]) -> list[Tensor]:
        tokens = copy_async(self._tokenizer(texts), self._device)
        with self._on_device(), self._autocast():
            words = _unit(self._model.encode_text(tokens))  # type: ignore[operator]
        return [each.clone() for each in words]

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.float16) if self._on_gpu else nullcontext()


class ImageClip(_Clip):
    """The vision tower of a CLIP in transformers' layout, and its projection."""

    def __init__(self, tower: CLIPVisionModelWithProjection, use: ClipUse, device: str, offload: bool = False) -> None:
        own = {"size": tower.config.image_size, "mean": _OPENAI_MEAN, "std": _OPENAI_STD}
        super().__init__(tower, use, own, device, offload)
        self._tower = tower if offload else tower.to(device)
        self._weights = tower.dtype

    @classmethod
    def load(
        cls, folder: Path, choice: ModelChoice, use: ClipUse | None, device: str, offload: bool = False
    ) -> ImageClip:
        """From a folder with ``config.json`` and safetensors, of which only the tower is read; no code of the folder's.

        Raises WeightsError when those weights are not exactly the config's.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            vision = CLIPVisionConfig(**{**config["vision_config"], "projection_dim": config["projection_dim"]})
            state: dict[str, Tensor] = {}
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    state |= {key: file.get_tensor(key) for key in file.keys() if key.startswith(_TOWER)}  # noqa: SIM118
            state.pop("vision_model.embeddings.position_ids", None)  # no weight: 0, 1, 2 …
            tower, about = CLIPVisionModelWithProjection.from_pretrained(
                None, config=vision, state_dict=state, dtype=getattr(torch, choice.dtype), output_loading_info=True
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise WeightsError(f"{folder}: not a usable CLIP vision tower: {error}") from error
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, about[what])):
                raise WeightsError(f"{folder}: not the weights of its vision tower: {what}: {', '.join(names[:5])}")
        return cls(tower.eval().requires_grad_(False), use or ClipUse(1.0), device, offload)

    def embed(self, images: Tensor) -> Tensor:
        """The unit vectors (B, D) of images (B, 3, H, W) in 0..1."""
        pixels = self._pixels(images).to(self._weights)
        with self._on_device():
            return _unit(self._tower(pixels).image_embeds)


# What OpenAI's models were trained with.
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def _unit(vectors: Tensor) -> Tensor:
    return (vectors / vectors.norm(dim=-1, keepdim=True)).to(vectors.dtype)


def with_text(views: Tensor, text: Tensor, scale: float) -> float:
    """Alignment of the views' vectors (V, D) with a text's (D,): the geometric mean of their cosines, over ``scale``.

    Outliers are dropped, and negative cosines count as 0.
    """
    return geometric_mean(drop_outliers(_cosines(views, text)).clamp(0, 1)) / scale


def with_picture(views: Tensor, picture: Tensor, scale: float) -> float:
    """The same with a picture's vector. Nothing is clipped: a kept cosine under 0 makes it 0."""
    mean = geometric_mean(drop_outliers(_cosines(views, picture)))
    return 0.0 if mean != mean else mean / scale


def _cosines(views: Tensor, prompt: Tensor) -> Tensor:
    return (views @ prompt[:, None])[:, 0].float().cpu()
