"""MVDream (Shi et al. 2023, https://arxiv.org/abs/2308.16512) as guidance, from diffusers' classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from generation.accelerate.pinned import send
from generation.accelerate.shared_start import SharedStart
from generation.accelerate.text_cache import TextCache, cut
from generation.generators.base import Checkpoint
from generation.generators.dreamgaussian.guidance.distillation import Distillation
from generation.generators.dreamgaussian.guidance.multiview import camera_embedding, join_views
from generation.weights.latent_diffusion import load_unet
from generation.weights.registry import MultiViewUse
from generation.weights.strict import load_model


class MVDream(Distillation):
    """Score distillation (Poole et al. 2022) on four views at once, and multi-view sampling with DDIM."""

    views = 4

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        front_azimuth: float = 0.0,
    ) -> None:
        """`front_azimuth`: see `camera_embedding`."""
        super().__init__(unet, vae, scheduler, unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1))
        self._text_encoder = text_encoder.eval().requires_grad_(False)
        self._networks.append(self._text_encoder)
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._front_azimuth = front_azimuth
        self._texts = TextCache(self._encode_texts)
        self._joint = join_views(unet, self.views, shared_text=True)
        self._start = SharedStart(unet)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype, front_azimuth: float = 0.0) -> MVDream:
        """Load a folder with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler` in diffusers' layouts.

        The UNet may have the names that its authors published it with. Raises WeightsError.
        """
        local = {"local_files_only": True}
        unet = load_unet(folder / "unet", dtype)
        vae = load_model(AutoencoderKL, folder / "vae", dtype)
        text = load_model(CLIPTextModel, folder / "text_encoder", dtype)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", **local)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", **local)
        return cls(unet.to(device), vae.to(device), text.to(device), tokenizer, scheduler, front_azimuth)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> MVDream:
        """See `load`."""
        use = checkpoint.entry.used_as(MultiViewUse) or MultiViewUse()
        return cls.load(checkpoint.folder, checkpoint.device, checkpoint.dtype, use.front_azimuth)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> None:
        """See `TextGuidance.read`."""
        self._texts.read(texts)

    def cut(self, text: str) -> tuple[int, int] | None:
        """See `TextGuidance.cut`."""
        return cut(self._tokenizer, text)

    @torch.no_grad()
    def prepare(self, prompt: str, negative_prompt: str) -> Tensor:
        """Text states (2, L, C): of the negative prompt, then of the prompt."""
        return torch.stack(self._texts.read([negative_prompt, prompt]))

    def _encode_texts(self, texts: list[str]) -> list[Tensor]:
        ids = self._tokenizer(
            texts,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        states = self._text_encoder(send(ids, self._unet.device)).last_hidden_state
        return [each.clone() for each in states]

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
        """See `TextGuidance.sample`. All V views attend to each other."""
        views, size = len(camera_to_world), self._unet.config.sample_size
        latents = torch.randn(views, self._unet.config.in_channels, size, size, generator=generator)
        latents = latents.to(self._unet.device, self._unet.dtype)
        self._scheduler.set_timesteps(steps)
        known = latents[:0] if first is None else self._latents(self._resize(first[None].to(latents)))
        count, noise_of_known = len(known), latents[: len(known)].clone()
        try:
            self._joint.views = views
            for t in self._scheduler.timesteps:
                at = t.to(latents.device).repeat(2, views)
                latents[:count] = self._scheduler.add_noise(known, noise_of_known, t[None])
                both = latents.repeat(2, 1, 1, 1, 1)
                both[1, :count], at[1, :count] = known, 0
                noise = self._guided(both, at, camera_to_world, condition[None], guidance_scale)
                latents = self._scheduler.step(noise, t, latents).prev_sample
            latents[:count] = known
        finally:
            self._joint.views = self.views
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
        with self._start.halves_are_alike():
            return self._guided(noisy.repeat(2, 1, 1, 1, 1), t.repeat(2, 1), camera_to_world, conditions, scale)

    def _guided(self, both: Tensor, t: Tensor, camera_to_world: Tensor, conditions: Tensor, scale: float) -> Tensor:
        """Of noisy latents (2, S * V, C, h, w) and steps (2, S * V): without the conditions (S, 2, L, C), and with."""
        words = conditions.to(both)
        cameras = camera_embedding(camera_to_world, self._front_azimuth).to(both)
        (noise,) = self._unet(
            both.flatten(0, 1),
            t.flatten(),
            torch.cat([words[:, 0], words[:, 1]]),
            class_labels=cameras.repeat(2, 1),
            return_dict=False,
        )
        without, given = noise.chunk(2)
        return without + scale * (given - without)
