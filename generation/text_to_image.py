"""Text to image with FLUX.1-schnell (Black Forest Labs, 2024), through ``diffusers.FluxPipeline``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxPipeline

from generation.settings import TextToImageModel


class TextToImage:
    """A loaded FLUX pipeline and the way it is asked."""

    def __init__(self, pipe: FluxPipeline, options: TextToImageModel, device: str) -> None:
        self._pipe = pipe
        self._options = options
        self._device = device

    @classmethod
    def load(cls, folder: Path, options: TextToImageModel, device: str) -> TextToImage:
        """Load a diffusers FLUX folder (model_index.json and one folder a component) onto ``device``."""
        pipe = FluxPipeline.from_pretrained(
            folder, dtype=getattr(torch, options.dtype), local_files_only=True, use_safetensors=True
        )
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe.to(device), options, device)

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: list[int]) -> list[torch.Tensor]:
        return [self._one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    @torch.no_grad()
    def _one(self, prompt: str, seed: int) -> torch.Tensor:
        """One image (3, image_size, image_size), float32 in 0..1, on the pipeline's device.

        Requests are sampled one at a time: batching gains little here (the transformer fills a GPU alone), and this way
        an image depends on its prompt and seed only. The noise is drawn on the CPU, so it is the same on every device.
        """
        options = self._options
        images = self._pipe(  # type: ignore[operator]
            prompt=options.prompt_template.replace("{prompt}", prompt),
            width=options.image_size,
            height=options.image_size,
            num_inference_steps=options.steps,
            guidance_scale=0.0,  # schnell is distilled without guidance
            max_sequence_length=options.max_sequence_length,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        return images[0].float().clamp(0, 1)
