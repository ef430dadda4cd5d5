"""What pipeline tests use in place of trained models: a CLIP that sees colours, and splats made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from generation.splats.gaussians import SH_C0, Gaussians
from generation.stages.self_check import ImageClip, Lpips, Quality, SelfCheck, TextClip
from generation.weights.registry import ClipUse

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class ColourClip(nn.Module):
    """Embeds a picture as the colour that its white background lacks, and a text as the colour that it names."""

    def __init__(self) -> None:
        super().__init__()
        cfg = {"size": (64, 64), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        self.visual = SimpleNamespace(preprocess_cfg=cfg)

    def encode_image(self, images: Tensor) -> Tensor:
        covered = 1 - images.amin(dim=1, keepdim=True)
        return (images * covered).mean(dim=(2, 3)) + 1e-6

    def encode_text(self, tokens: Tensor) -> Tensor:
        return torch.tensor(list(COLOURS.values()))[tokens]


class ColourTokenizer:
    """As open_clip's own, but that it gives the number of the first colour that each prompt names."""

    context_length = 12

    def __call__(self, prompts: list[str]) -> Tensor:
        return torch.tensor([next(i for i, colour in enumerate(COLOURS) if colour in prompt) for prompt in prompts])

    def clean_fn(self, text: str) -> str:
        return text

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())


tokenizer = ColourTokenizer()


def colour_check(
    cosine_scale: float = 1.0,
    image_cosine_scale: float = 1.0,
    image: ImageClip | None = None,
    quality: Quality | None = None,
    lpips: Lpips | None = None,
) -> SelfCheck:
    use = ClipUse(cosine_scale, image_cosine_scale)
    return SelfCheck(TextClip(ColourClip(), tokenizer, use, "cpu"), image, quality, lpips)


class Painter:
    """Text to image: a square of the colour that the prompt names, on white; nothing for a prompt without one."""

    def generate(self, prompts: list[str], seeds: list[int]) -> list[torch.Tensor]:
        return [self.paint(prompt) for prompt in prompts]

    def truncation(self, prompt: str) -> dict[str, tuple[int, int]]:
        self.asked = prompt
        return {"text_to_image CLIP": (2, 3)} if "epic" in prompt else {}

    def paint(self, prompt: str) -> torch.Tensor:
        if "explode" in prompt:
            raise RuntimeError("out of paint")
        image = torch.ones(3, 64, 64)
        for name, colour in COLOURS.items():
            if name in prompt:
                image[:, 16:48, 16:48] = torch.tensor(colour)[:, None, None]
        return image


class WhiteIsBackground:
    def remove(self, images: torch.Tensor) -> torch.Tensor:
        return (images.amin(dim=1, keepdim=True) < 0.5).float()


def ball(colour: str = "red", count: int = 8000, seed: int = 0, radius: float = 0.5) -> Gaussians:
    """An opaque ball of one colour."""
    return ball_of(torch.tensor(COLOURS[colour]), count, torch.Generator().manual_seed(seed), radius)


def ball_of(rgb: Tensor, count: int, generator: torch.Generator, radius: float = 0.5) -> Gaussians:
    """The same of any colour (3,), 0..1."""
    means = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1) * radius
    sh = ((rgb.cpu() - 0.5) / SH_C0).expand(count, 1, 3).clone()
    return Gaussians(
        means=means,
        quats=torch.randn(count, 4, generator=generator),
        log_scales=torch.full((count, 3), 0.03 * radius / 0.5).log(),
        logit_opacities=torch.full((count,), 4.0),
        sh=sh,
    )
