"""Views of an object from a picture: ImageDream (Wang and Shi 2023, https://arxiv.org/abs/2312.02201).

The picture conditions the model twice. Its CLIP features, resampled to a few tokens, are attended to beside the text.
Its latents are a fifth frame without noise, which the views attend to. In the unconditional case the CLIP features and
the latents are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel

from generation.accelerate.cuda_graph import GraphedFunction, split_batch
from generation.accelerate.offload import Offloaded
from generation.generators.multiview.attention import join_views
from generation.generators.multiview.base import FOUR_VIEWS, MultiViewModel, ViewAngles
from generation.generators.multiview.image_prompt import SEEN_WIDTH, load_image_prompt_unet
from generation.generators.multiview.sampling import Sampler, ViewSampling, guided_noise, views_only
from generation.generators.multiview.text_encoder import TextEncoder
from generation.weights import WeightsError
from generation.weights.strict import load_model


class ImageDream(MultiViewModel):
    """See `MultiViewModel`. Needs a cut-out; a text is optional."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        resampler: nn.Module,
        vae: AutoencoderKL,
        words: TextEncoder,
        image_encoder: CLIPVisionModel,
        processor: CLIPImageProcessor,
        scheduler: DDIMScheduler,
        *,
        front_azimuth: float = 0.0,
        views: ViewAngles = FOUR_VIEWS,
        steps: int = 30,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        offload_encoders: bool = False,
    ) -> None:
        white = (1.0, 1.0, 1.0)
        super().__init__(
            unet, vae, words, scheduler, front_azimuth, views, steps, negative_prompt, white, offload_encoders
        )
        self._resampler = resampler.eval().requires_grad_(False)
        self._image_encoder = image_encoder.eval().requires_grad_(False)
        self._networks.append(resampler)
        self._offloaded_encoder: Offloaded | None = None
        if offload_encoders:
            self._offloaded_encoder = Offloaded(image_encoder, unet.device)
            self._offloaded_encoder.offload()
        else:
            self._networks.append(image_encoder)
        self._processor = processor
        self._scale = guidance_scale
        self._cameras = F.pad(self._cameras, (0, 0, 0, 1))  # the picture's frame has no camera: zeros
        seen = torch.zeros(1, self._tokens_seen, SEEN_WIDTH, device=unet.device, dtype=unet.dtype)
        with torch.no_grad():
            self._nothing = self._resampler(seen)[0]  # (I, C)
        join_views(unet, len(views) + 1, shared_text=True, image_tokens=len(self._nothing))
        self._sampler = Sampler(self._schedule, self._guided, picture_as_last_frame)
        self._look = GraphedFunction(self._see)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype, **options: object) -> ImageDream:
        """Load a folder with one folder a component, as ashawkey/imagedream-ipmv-diffusers has them.

        `options`: the constructor's. Raises WeightsError.
        """
        unet, resampler = load_image_prompt_unet(folder / "unet", dtype)
        vae = load_model(AutoencoderKL, folder / "vae", dtype).to(device)
        encoder = load_model(CLIPVisionModel, folder / "image_encoder", dtype).to(device)
        if encoder.config.hidden_size != SEEN_WIDTH:
            raise WeightsError(
                f"{folder / 'image_encoder'}: hidden_size is {encoder.config.hidden_size}, must be {SEEN_WIDTH}"
            )
        return cls(
            unet.to(device),
            resampler.to(device),
            vae,
            TextEncoder.load(folder, device, dtype),
            encoder,
            CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True),
            DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
            **options,  # type: ignore[arg-type]
        )

    @property
    def _tokens_seen(self) -> int:
        config = self._image_encoder.config
        return (config.image_size // config.patch_size) ** 2 + 1

    def _begin(
        self, words: Sequence[str], cutouts: Sequence[Tensor | None], generators: list[torch.Generator]
    ) -> list[ViewSampling]:
        self.encode(words)
        given = [cutout for cutout in cutouts if cutout is not None]
        if len(given) < len(cutouts):
            raise ValueError("ImageDream draws views of a picture: a cut-out is missing")
        with self._offloaded_encoder.on_device() if self._offloaded_encoder else nullcontext():
            seen = [self._look(*self._prepared(given[some])) for some in split_batch(len(given))]
        tokens, means, deviations = (torch.cat(parts) for parts in zip(*seen, strict=True))
        samplings = []
        for text, generator, token, mean, deviation in zip(words, generators, tokens, means, deviations, strict=True):
            of_picture = self._noise(generator, mean.shape)  # drawn before the views' noise, as in the authors' code
            told = torch.cat([self._words.pair(text, self._negative_prompt), torch.stack([self._nothing, token])], 1)
            known = (mean + deviation * of_picture,)
            samplings.append(ViewSampling(self._noise(generator, self._latent_shape), told, known, self._sampler.steps))
        return samplings

    def _prepared(self, cutouts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The pictures preprocessed for CLIP, and for the autoencoder."""
        images = torch.stack([self._over_backdrop(cutout) for cutout in cutouts])
        pixels = self._processor(images=list((images.cpu() * 255).byte()), return_tensors="pt").pixel_values
        size = (self.image_size, self.image_size)
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return pixels.to(self._cameras.device, self._cameras.dtype), images

    def _see(self, pixels: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens (S, I, C), and mean and standard deviation (S, C, h, w) of the latents' posterior."""
        seen = self._image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return (self._resampler(seen), *self._posterior(images))

    def _captured(self) -> list[GraphedFunction]:
        return [*super()._captured(), self._look]

    def _capture_encoder(self, size: int) -> None:
        if self._offloaded_encoder:  # a CUDA graph holds the addresses of its weights
            return
        cutout = torch.ones(4, self.image_size, self.image_size)
        self._look.capture(*self._prepared([cutout] * size))

    def _guided(self, both: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return guided_noise(self._unet, both, t, self._cameras.repeat(len(words), 1), words, self._scale)


def picture_as_last_frame(latents: Tensor, t: Tensor, signal: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """`Frames`: the views, then the picture's latents (S, C, h, w); zeros in the unconditional half."""
    both, at = views_only(latents, t, signal)
    last = torch.stack([torch.zeros_like(known), known])[:, :, None]
    return torch.cat([both, last], 2), torch.cat([at, at[:, :, :1]], 2)
