"""Zero123 (Liu et al. 2023, https://arxiv.org/abs/2303.11328) and Stable Zero123 as guidance, from diffusers' classes.

The model shows the object of a known view from another camera. The known view conditions it by latents concatenated to
the noisy ones (8 channels in all) and by a CLIP embedding. The camera is four numbers, which are appended to the
embedding and projected with it by one linear layer.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from generation.generators.base import Checkpoint
from generation.generators.dreamgaussian.guidance.distillation import Distillation
from generation.weights import WeightsError
from generation.weights.latent_diffusion import load_unet
from generation.weights.strict import load_model, read_weights

IMAGE_SIZE = 256  # pixels, what the models were trained at, whatever `sample_size` their configs name
CAMERA_NUMBERS = 4
PROJECTIONS = ("clip_camera_projection", "cc_projection")  # the folder's names in DreamGaussian's and diffusers' layout


class Zero123(Distillation):
    """Score distillation on single views, each against the reference view."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        image_encoder: CLIPVisionModelWithProjection,
        projection: nn.Linear,
        processor: CLIPImageProcessor,
        scheduler: DDIMScheduler,
        stable: bool,
    ) -> None:
        """`stable`: the fourth number of a camera is the known view's polar angle, not a change of distance."""
        super().__init__(unet, vae, scheduler, IMAGE_SIZE)
        self._image_encoder = image_encoder.eval().requires_grad_(False)
        self._projection = projection.requires_grad_(False)
        self._networks.extend([self._image_encoder, self._projection])
        self._processor = processor
        self._stable = stable

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype, stable: bool) -> Zero123:
        """Load a folder with one folder a component, as DreamGaussian's pipeline saves it. Raises WeightsError."""
        unet = load_unet(folder / "unet", dtype).to(device)
        vae = load_model(AutoencoderKL, folder / "vae", dtype).to(device)
        encoder = load_model(CLIPVisionModelWithProjection, folder / "image_encoder", dtype).to(device)
        projection = load_projection(folder, encoder.config.projection_dim).to(device, dtype)
        processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        return cls(unet, vae, encoder, projection, processor, scheduler, stable)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Zero123:
        """See `load`."""
        return cls.load(checkpoint.folder, checkpoint.device, checkpoint.dtype, stable=False)

    @classmethod
    def from_stable_checkpoint(cls, checkpoint: Checkpoint) -> Zero123:
        """See `load`: of Stable Zero123."""
        return cls.load(checkpoint.folder, checkpoint.device, checkpoint.dtype, stable=True)

    @torch.no_grad()
    def prepare(self, cutout: Tensor, elevation: float) -> Tensor:
        """The condition of one scene, from its cut-out (4, S, S), RGBA in 0..1, seen from `elevation` (degrees up).

        A vector: `elevation`, CLIP embedding and latents of the view over white.
        """
        image = (cutout[:3] * cutout[3:] + 1 - cutout[3:])[None]
        image = self._resize(image)
        pixels = self._processor(images=list((image.cpu() * 255).byte()), return_tensors="pt").pixel_values
        embedding = self._image_encoder(pixels.to(self._unet.device, self._unet.dtype)).image_embeds
        latents = self._encode(image.to(self._unet.device))  # not scaled, unlike those that are denoised
        known = torch.tensor([elevation], device=latents.device)
        return torch.cat([known, embedding.flatten().float(), latents.flatten().float()])

    def _any_condition(self) -> Tensor:
        return self.prepare(torch.ones(4, IMAGE_SIZE, IMAGE_SIZE, device=self._unet.device), 0.0)

    def _weight(self, alphas: Tensor) -> Tensor:
        return 1 - alphas

    def _guided_noise(
        self, noisy: Tensor, t: Tensor, camera_to_world: Tensor, conditions: Tensor, scale: float
    ) -> Tensor:
        """See `Distillation`: the condition is the known view."""
        width = self._projection.out_features
        elevations, embeddings, views = conditions.split([1, width, conditions.shape[1] - 1 - width], 1)
        cameras = camera_numbers(camera_to_world.to(conditions), elevations[:, 0], self._stable)
        words = self._projection(torch.cat([embeddings, cameras], 1).to(noisy))[:, None]
        views = views.reshape(noisy.shape).to(noisy)
        (both,) = self._unet(
            torch.cat([noisy.repeat(2, 1, 1, 1), torch.cat([torch.zeros_like(views), views])], 1),
            t.repeat(2),
            torch.cat([torch.zeros_like(words), words]),
            return_dict=False,
        )
        without, given = both.chunk(2)
        return without + scale * (given - without)


def camera_numbers(camera_to_world: Tensor, elevations: Tensor, stable: bool) -> Tensor:
    """Zero123's four numbers (C, 4) of orbit poses (C, 4, 4) against known views at `elevations` (C,), degrees up.

    How much lower the camera stands (radians), sine and cosine of how far it went around, and how much farther away it
    is: always as far. Stable Zero123 wants the known view's angle from the pole there.
    """
    x, y, z = torch.nn.functional.normalize(camera_to_world[:, :3, 3], dim=-1).unbind(-1)
    known = torch.deg2rad(elevations)
    azimuth = torch.atan2(x, z)
    last = math.pi / 2 - known if stable else torch.zeros_like(known)
    return torch.stack([known - torch.asin(y.clamp(-1, 1)), azimuth.sin(), azimuth.cos(), last], 1)


def load_projection(folder: Path, width: int) -> nn.Linear:
    """The layer that mixes an embedding of `width` and a camera, of either published layout. Raises WeightsError."""
    path = next((folder / name for name in PROJECTIONS if (folder / name).is_dir()), folder / PROJECTIONS[0])
    layer = nn.Linear(width + CAMERA_NUMBERS, width)
    try:
        layer.load_state_dict({name.rpartition(".")[2]: tensor for name, tensor in read_weights(path).items()})
    except RuntimeError as error:
        raise WeightsError(f"{path}: not the projection of an embedding of {width} and a camera: {error}") from error
    return layer
