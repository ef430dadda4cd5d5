"""Views of an object from words: MVDream (Shi et al. 2023, https://arxiv.org/abs/2308.16512)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from generation.generators.multiview.attention import join_views
from generation.generators.multiview.base import FOUR_VIEWS, MultiViewModel, ViewAngles
from generation.generators.multiview.sampling import Sampler, ViewSampling, guided_noise, known_frame, views_only
from generation.generators.multiview.text_encoder import TextEncoder
from generation.weights.latent_diffusion import load_unet
from generation.weights.strict import load_model


class MVDreamViews(MultiViewModel):
    """See `MultiViewModel`. Needs a text; a model that was trained with a known view needs a cut-out."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        words: TextEncoder,
        scheduler: DDIMScheduler,
        *,
        front_azimuth: float = 0.0,
        views: ViewAngles = FOUR_VIEWS,
        steps: int = 30,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        known_view: bool = False,
        backdrop: Sequence[float] = (1.0, 1.0, 1.0),
        offload_encoders: bool = False,
    ) -> None:
        """`views` are four, as in training, or more. With `known_view` the cut-out is the first view, and the others
        are sampled to be consistent with it.
        """
        super().__init__(
            unet, vae, words, scheduler, front_azimuth, views, steps, negative_prompt, backdrop, offload_encoders
        )
        self._known_view = known_view
        self._scale = guidance_scale
        self._joint = join_views(unet, len(views), shared_text=True)
        frames = known_frame(0) if known_view else views_only
        self._sampler = Sampler(self._schedule, self._guided, frames)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype, **options: object) -> MVDreamViews:
        """Load a folder with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler` in diffusers' layouts.

        The UNet may have the names that its authors published it with. `options`: the constructor's. Raises
        WeightsError.
        """
        unet = load_unet(folder / "unet", dtype).to(device)
        vae = load_model(AutoencoderKL, folder / "vae", dtype).to(device)
        words = TextEncoder.load(folder, device, dtype)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        return cls(unet, vae, words, scheduler, **options)  # type: ignore[arg-type]

    def _begin(
        self, words: Sequence[str], cutouts: Sequence[Tensor | None], generators: list[torch.Generator]
    ) -> list[ViewSampling]:
        self.encode(words)
        noises = [self._noise(generator, self._latent_shape) for generator in generators]
        known: list[tuple[Tensor, ...]] = [()] * len(words)
        if self._known_view:
            given = [cutout for cutout in cutouts if cutout is not None]
            if len(given) < len(cutouts):
                raise ValueError("this model draws views around a known one: a cut-out is missing")
            images = torch.stack([self._over_backdrop(cutout) for cutout in given])
            mean, _ = self._posterior(F.interpolate(images, (self.image_size, self.image_size), mode="area"))
            known = [(view, noise[0]) for view, noise in zip(mean, noises, strict=True)]
        return [
            ViewSampling(noise, self._words.pair(text, self._negative_prompt), about, self._sampler.steps)
            for noise, text, about in zip(noises, words, known, strict=True)
        ]

    def _final_latents(self, sampling: ViewSampling) -> Tensor:
        latents = sampling.latents.clone()
        if sampling.known:
            latents[0] = sampling.known[0]
        return latents

    def _guided(self, both: Tensor, t: Tensor, words: Tensor) -> Tensor:
        cameras = self._cameras.repeat(len(words), 1)
        return guided_noise(self._unet, both, t, cameras, words, self._scale)
