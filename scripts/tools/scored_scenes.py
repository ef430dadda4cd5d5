"""Scenes and small models on which the public validators' scoring was run, by scripts/tools/fidelity_score.py.

Its answers are in golden/score.json; scenes and models are drawn anew from set seeds.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Dinov2Config

from generation.stages.self_check import ImageClip, Lpips, Quality, QualityNet, SelfCheck, TextClip
from generation.stages.self_check.quality import WEIGHTS
from generation.weights.registry import REGISTRY
from scripts.tools.golden_weights import GOLDEN as FOLDER
from scripts.tools.golden_weights import weights

GOLDEN = FOLDER / "score.json"
SIZE = 56  # pixels of a view
NAMES = ("a calm one", "a rough one", "an odd one")
WIDTH = 24  # of the quality net


@cache
def scenes() -> dict[str, Tensor]:
    """Views (16, 3, 56, 56) in 0..1, of 8 bits, on white; the last is the first."""
    grid = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    found = {}
    for number, name in enumerate(NAMES):
        views = []
        for turn in range(15):
            angle = torch.tensor(2 * torch.pi * turn / 15)
            across = x * (1 + 0.3 * number * angle.cos())
            inside = across**2 + (y * 1.2) ** 2 < 0.5
            waves = [(k + 2 + 3 * number) * across + (k + 1) * angle + k * y for k in range(3)]
            colours = torch.stack([0.5 + 0.45 * wave.sin() * (1 + number * y).cos() for wave in waves])
            if name == "an odd one" and turn in (4, 9):  # outliers
                colours = 1 - colours * 0.3
            views.append(torch.where(inside, colours, torch.ones(3, 1, 1)))
        whole = torch.stack([*views, views[0]])
        found[name] = (whole.clamp(0, 1) * 255).floor() / 255
    return found


@cache
def pictures() -> dict[str, Image.Image]:
    """A picture for each scene, of another size and shape than the models want."""
    found = {}
    for name, views in scenes().items():
        picture = F.interpolate(views[1:2] * 0.9, size=(90, 130), mode="bilinear")[0]
        found[name] = Image.fromarray((picture * 255).to(torch.uint8).permute(1, 2, 0).numpy())
    return found


def _random(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


class Clip(nn.Module):
    """Embeds a picture by its coarse pixels, which saturate, and a text by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = SimpleNamespace(preprocess_cfg={"size": 224, "mean": (0.0,) * 3, "std": (1.0,) * 3})
        self.layer = _random(3 * 14 * 14, 32, seed=1)
        use = REGISTRY["clip-convnext-large-d"].clip
        assert use is not None
        assert use.mean is not None
        assert use.std is not None
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (use.mean, use.std))
        words = []
        for number, views in enumerate(scenes().values()):
            pixels = (F.interpolate(views, size=(224, 224), mode="bicubic") - mean) / std
            seen = F.normalize(self.encode_image(pixels), dim=1)
            words.append(seen.mean(0) + 0.35 * _random(32, seed=10 + number))
        # Of the last scene: two views that go against the text, and two that fit it well. Which of them are outliers
        # is another matter once what is negative is 0.
        cosines = 0.1 + 0.001 * torch.arange(16.0)
        cosines[[4, 9, 6, 12, 15]] = torch.tensor([-0.4, -0.3, 0.35, 0.3, 0.1])
        words[-1] = torch.linalg.lstsq(seen[:15].double(), cosines[:15].double()[:, None], driver="gelsd").solution[
            :, 0
        ]
        self.words = torch.stack([each.float() for each in words])

    def encode_image(self, pixels: Tensor) -> Tensor:
        return (F.avg_pool2d(pixels, 16).flatten(1) @ self.layer / 20).tanh()

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.words[tokens.flatten()].clone()


class Tower(nn.Module):
    """Embeds a picture of 336 pixels by its coarse pixels."""

    dtype = torch.float32
    config = SimpleNamespace(image_size=336)

    def __init__(self) -> None:
        super().__init__()
        self.layer = _random(3 * 14 * 14, 32, seed=3)

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(image_embeds=(F.avg_pool2d(pixels, 24).flatten(1) @ self.layer / 20).tanh())


def tokenizer(prompts: str | list[str]) -> Tensor:
    return torch.tensor([NAMES.index(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)])


def quality_file() -> dict[str, Tensor]:
    """A quality net's tensors under the published names."""
    w = WIDTH
    shapes: dict[str, list[int]] = {
        "backbone.embeddings.cls_token": [1, 1, w], "backbone.embeddings.mask_token": [1, w],
        "backbone.embeddings.position_embeddings": [1, (SIZE // 14) ** 2 + 1, w],
        "backbone.embeddings.patch_embeddings.projection.weight": [w, 3, 14, 14],
        "backbone.embeddings.patch_embeddings.projection.bias": [w],
        "backbone.layernorm.weight": [w], "backbone.layernorm.bias": [w],
        "score_head.weight": [1, w], "score_head.bias": [1], "emb_head.weight": [8, w], "emb_head.bias": [8],
    }  # fmt: skip
    for layer in range(2):
        at = f"backbone.encoder.layer.{layer}"
        linear = {"mlp.fc1": [4 * w, w], "mlp.fc2": [w, 4 * w], "attention.output.dense": [w, w]}
        linear |= {f"attention.attention.{part}": [w, w] for part in ("query", "key", "value")}
        for name, shape in linear.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        shapes |= {f"{at}.{name}": [w] for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")}
        shapes |= {f"{at}.layer_scale{n}.lambda1": [w] for n in (1, 2)}
    return weights(shapes, seed=4)


def quality_config() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=14, mlp_ratio=4
    )


def alexnet_file() -> dict[str, Tensor]:
    """AlexNet's convolutions under torchvision's names."""
    shapes = {"0": [64, 3, 11, 11], "3": [192, 64, 5, 5], "6": [384, 192, 3, 3], "8": [256, 384, 3, 3],
              "10": [256, 256, 3, 3]}  # fmt: skip
    named = {f"features.{index}.weight": shape for index, shape in shapes.items()}
    named |= {f"features.{index}.bias": shape[:1] for index, shape in shapes.items()}
    return weights(named, seed=5)


@dataclass
class Models:
    """The small models, for either side."""

    quality: QualityNet

    @classmethod
    def draw(cls) -> Models:
        with tempfile.TemporaryDirectory() as folder:
            save_file(quality_file(), Path(folder) / WEIGHTS)
            quality_config().save_pretrained(folder)
            return cls(QualityNet.load(Path(folder)))

    def clip(self) -> Clip:
        return Clip()

    def picture_features(self, pixels: Tensor) -> Tensor:
        return Tower()(pixels).image_embeds

    @staticmethod
    def alexnet() -> Any:
        """With ``features``, which is all that torchmetrics takes of torchvision's."""
        relu, pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)
        features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2), relu, pool, nn.Conv2d(64, 192, 5, padding=2), relu, pool,
            nn.Conv2d(192, 384, 3, padding=1), relu, nn.Conv2d(384, 256, 3, padding=1), relu,
            nn.Conv2d(256, 256, 3, padding=1), relu, pool,
        )  # fmt: skip
        features.load_state_dict({name.removeprefix("features."): value for name, value in alexnet_file().items()})
        return SimpleNamespace(features=features)


@cache
def ours() -> SelfCheck:
    """Our self-check with the same models."""
    text, image = (REGISTRY[name].clip for name in ("clip-convnext-large-d", "llm2clip-l-14-336"))
    assert text is not None
    assert image is not None
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(alexnet_file(), file.name)
        lpips = Lpips.load(Path(file.name), "cpu")
    return SelfCheck(
        TextClip(Clip(), tokenizer, text, "cpu"),
        ImageClip(Tower(), image, "cpu"),  # type: ignore[arg-type]
        Quality(Models.draw().quality, "cpu"),
        lpips,
    )


@torch.no_grad()
def measure(name: str, kind: str) -> dict[str, float]:
    """Our figures of a scene, held against its text or its picture."""
    (check,) = ours()._measure([scenes()[name]], [name if kind == "text" else pictures()[name]])
    assert check.score is not None
    return {**{part: value for part, value in check.parts.items() if value is not None}, "score": check.score}
