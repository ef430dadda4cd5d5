"""What multi-view diffusion models share: texts, pictures and seeds to consistent views, one step per call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from generation.accelerate.cuda_graph import GraphedFunction, compiled_sizes, split_batch
from generation.accelerate.offload import Offloaded
from generation.accelerate.pinned import copy_async
from generation.accelerate.unet import compile_unet
from generation.generators.multiview.attention import camera_embedding
from generation.generators.multiview.sampling import Sampler, Schedule, ViewSampling
from generation.generators.multiview.text_encoder import TextEncoder
from generation.splats.cameras import orbit

#: elevation (degrees up) and azimuth (degrees) of each view
ViewAngles = Sequence[tuple[float, float]]
FOUR_VIEWS: ViewAngles = ((0.0, 0.0), (0.0, 90.0), (0.0, 180.0), (0.0, 270.0))


class MultiViewModel:
    """Samples views of several objects. An object's views depend on its text, picture and seed only, up to rounding."""

    #: set by subclasses, which also add their networks to `_networks`
    _sampler: Sampler

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        words: TextEncoder,
        scheduler: DDIMScheduler,
        front_azimuth: float,
        views: ViewAngles,
        steps: int,
        negative_prompt: str,
        backdrop: Sequence[float],
        offload_encoders: bool,
    ) -> None:
        """`views`: their cameras. `front_azimuth`: see `camera_embedding`. `backdrop`: RGB behind the object, 0..1.

        `offload_encoders`: those of texts and pictures, which work once a request, are on the GPU only then.
        """
        self.image_size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        self._unet = unet.eval().requires_grad_(False)
        self._vae = vae.eval().requires_grad_(False)
        self._words = words
        self._negative_prompt = negative_prompt
        self._backdrop = torch.tensor(backdrop).view(3, 1, 1)
        elevations, azimuths = (torch.tensor(each) for each in zip(*views, strict=True))
        poses = orbit(elevations, azimuths, 1.0, 45.0, 8, 8).camera_to_world
        self._cameras = camera_embedding(poses, front_azimuth).to(unet.device, unet.dtype)
        self._schedule = Schedule.of(scheduler, steps, unet.device)
        size = unet.config.sample_size
        self._latent_shape = (len(views), unet.config.out_channels, size, size)
        self._decode = GraphedFunction(self._images)
        self._networks = nn.ModuleList([unet, vae])
        if offload_encoders:
            words.offloaded = Offloaded(words.encoder, unet.device)
            words.offloaded.offload()
        else:
            self._networks.append(words.encoder)
        self._offloaded = Offloaded(self._networks, unet.device)
        self._is_compiled = False

    def _begin(
        self, words: Sequence[str], cutouts: Sequence[Tensor | None], generators: list[torch.Generator]
    ) -> list[ViewSampling]:
        raise NotImplementedError

    def _final_latents(self, sampling: ViewSampling) -> Tensor:
        """The latents (V, C, h, w) to decode."""
        return sampling.latents

    def _capture_encoder(self, size: int) -> None:
        """Capture the image encoder for a batch of this size."""

    def _captured(self) -> list[GraphedFunction]:
        return [self._decode, self._sampler.captured]

    @torch.no_grad()
    def begin(self, words: Sequence[str], cutouts: Sequence[Tensor | None], seeds: Sequence[int]) -> list[ViewSampling]:
        """Start a sampling for each object, from its text ("" for none), cut-out (4, S, S), RGBA in 0..1, and seed.

        Raises ValueError where this model needs a cut-out, and there is none.
        """
        return self._begin(words, cutouts, [torch.Generator().manual_seed(seed) for seed in seeds])

    def step(self, samplings: Sequence[ViewSampling]) -> None:
        """One denoising step of all, in batched UNet calls. If it fails, no sampling has changed."""
        self._sampler.step(samplings)

    @torch.no_grad()
    def views(self, samplings: Sequence[ViewSampling]) -> Tensor:
        """Decode finished samplings: (S, V, 3, image_size, image_size) in 0..1, on the model's device."""
        latents = torch.stack([self._final_latents(sampling) for sampling in samplings])
        return torch.cat([self._decode(latents[some])[0] for some in split_batch(len(samplings))])

    def encode(self, texts: Sequence[str]) -> None:
        """Encode texts in one batch into the cache that `begin` reads."""
        self._words.encode([*texts, self._negative_prompt])

    def truncation(self, text: str) -> tuple[int, int] | None:
        """(tokens that are read, tokens of the text) if the text is truncated, else None."""
        return self._words.truncation(text)

    @torch.no_grad()
    def warm_up(self, most: int, progress: Callable[[str], None]) -> None:
        """On a GPU, compile and capture for up to `most` objects at once. Else do nothing."""
        if self._unet.device.type != "cuda":
            return
        if not self._is_compiled:
            compile_unet(self._unet)
            # Not compiled: it runs once per request, in 18 ms for one object (H200, eager).
            self._vae.to(memory_format=torch.channels_last)
            self._is_compiled = True
            self._offloaded = Offloaded(self._networks, self._unet.device)  # the UNet has other parameters now
        for size in compiled_sizes(most):
            progress(f"compiling {type(self).__name__} for {size} of {most} at once")
            self._capture_encoder(size)
            (sampling,) = self.begin([""], [torch.ones(4, self.image_size, self.image_size)], [0])
            self._sampler.capture(sampling, size)
            self._decode.capture(torch.randn(size, *self._latent_shape, device=self._unet.device))

    def offload(self) -> None:
        """Move the networks into pinned memory until `onload`. Samplings stay."""
        for captured in self._captured():
            captured.forget()
        self._offloaded.offload()

    def onload(self) -> None:
        """Move the networks back onto the GPU."""
        self._offloaded.onload()

    def _noise(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        return copy_async(torch.randn(tuple(shape), generator=generator), self._cameras.device)

    def _over_backdrop(self, cutout: Tensor) -> Tensor:
        """The cut-out over the backdrop, (3, S, S) in 0..1, on the model's device."""
        cutout = cutout.to(self._cameras.device)
        return cutout[:3] * cutout[3:] + self._backdrop.to(cutout) * (1 - cutout[3:])

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (S, C, h, w), float32, of latents of images (S, 3, image_size, image_size)."""
        posterior = self._vae.encode((images * 2 - 1).to(self._vae.dtype)).latent_dist
        scale = self._vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def _images(self, latents: Tensor) -> tuple[Tensor]:
        """(S, V, 3, H, W) in 0..1 of latents (S, V, C, h, w)."""
        flat = latents.flatten(0, 1) / self._vae.config.scaling_factor
        images = self._vae.decode(flat.to(self._vae.dtype)).sample.float()
        return ((images / 2 + 0.5).clamp(0, 1).unflatten(0, latents.shape[:2]),)
