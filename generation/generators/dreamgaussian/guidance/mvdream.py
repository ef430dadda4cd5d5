"""MVDream (Shi et al. 2023, https://arxiv.org/abs/2308.16512) as guidance by the text, from diffusers' classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from generation.accelerate.pinned import copy_async
from generation.generators.base import Checkpoint
from generation.generators.dreamgaussian.guidance.distillation import Distillation
from generation.generators.multiview.attention import camera_embedding, join_views
from generation.generators.multiview.sampling import (
    Sampler,
    Schedule,
    ViewSampling,
    guided_noise,
    known_frame,
    views_only,
)
from generation.generators.multiview.text_encoder import TextEncoder
from generation.weights.latent_diffusion import load_unet
from generation.weights.strict import load_model


class MVDream(Distillation):
    """Score distillation (Poole et al. 2022) on four views at once, and multi-view sampling with DDIM."""

    views = 4

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        words: TextEncoder,
        scheduler: DDIMScheduler,
        front_azimuth: float = 0.0,
    ) -> None:
        """`front_azimuth`: see `camera_embedding`."""
        super().__init__(unet, vae, scheduler, unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1))
        self._scheduler = scheduler
        self._front_azimuth = front_azimuth
        self._words = words
        self._networks.append(words.encoder)
        self._joint = join_views(unet, self.views, shared_text=True)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype, front_azimuth: float = 0.0) -> MVDream:
        """Load a folder with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler` in diffusers' layouts.

        The UNet may have the names that its authors published it with. Raises WeightsError.
        """
        unet = load_unet(folder / "unet", dtype).to(device)
        vae = load_model(AutoencoderKL, folder / "vae", dtype).to(device)
        words = TextEncoder.load(folder, device, dtype)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        return cls(unet, vae, words, scheduler, front_azimuth)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> MVDream:
        """See `load`."""
        return cls.load(checkpoint.folder, checkpoint.device, checkpoint.dtype, checkpoint.entry.front_azimuth)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> None:
        """Encode texts in one batch into the cache that `prepare` reads."""
        self._words.encode(texts)

    def truncation(self, text: str) -> tuple[int, int] | None:
        """(tokens that are read, tokens of the text) if the text is truncated, else None."""
        return self._words.truncation(text)

    @torch.no_grad()
    def prepare(self, prompt: str, negative_prompt: str) -> Tensor:
        """Text states (2, L, C): of the negative prompt, then of the prompt."""
        return self._words.pair(prompt, negative_prompt)

    def _any_condition(self) -> Tensor:
        return self.prepare("", "")

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        camera_to_world: Tensor,
        generator: torch.Generator,
        steps: int,
        guidance_scale: float,
        first: Tensor | None = None,
    ) -> Tensor:
        """Consistent images (V, 3, S, S) in 0..1 of what the condition describes, from poses (V, 4, 4).

        All V views attend to each other. With `first` (3, S, S) the first view is known, and the others are consistent
        with it. The model must be trained for that: it sees this view without noise, at time step 0, and the guidance
        is towards it, too.
        """
        views, size = len(camera_to_world), self._unet.config.sample_size
        latents = torch.randn(views, self._unet.config.in_channels, size, size, generator=generator)
        latents = copy_async(latents, self._unet.device)
        known: tuple[Tensor, ...] = ()
        if first is not None:
            known = self._latents(self._resize(first[None].to(latents)))[0].to(latents), latents[0]

        def noise(both: Tensor, t: Tensor, words: Tensor) -> Tensor:
            return self._guided(both, t, camera_to_world, words, guidance_scale)

        schedule = Schedule.of(self._scheduler, steps, self._unet.device)
        sampler = Sampler(schedule, noise, known_frame(0) if known else views_only)
        sampling = ViewSampling(latents, condition, known, steps)
        try:
            self._joint.views = views
            while not sampling.done:
                sampler.step([sampling])
        finally:
            self._joint.views = self.views
        latents = sampling.latents.to(self._unet.dtype)
        if known:
            latents[0] = known[0]
        images = self._vae.decode(latents / self._vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def _guided_noise(
        self,
        noisy: Tensor,
        t: Tensor,
        camera_to_world: Tensor,
        conditions: Tensor,
        scale: float,
    ) -> Tensor:
        """See `Distillation`: the condition is the text."""
        return self._guided(noisy.repeat(2, 1, 1, 1, 1), t.repeat(2, 1), camera_to_world, conditions, scale)

    def _guided(self, both: Tensor, t: Tensor, camera_to_world: Tensor, conditions: Tensor, scale: float) -> Tensor:
        """Of noisy latents (2, S * V, C, h, w) and steps (2, S * V): without the conditions (S, 2, L, C), and with."""
        cameras = camera_embedding(camera_to_world, self._front_azimuth)
        return guided_noise(self._unet, both, t, cameras, conditions, scale)
