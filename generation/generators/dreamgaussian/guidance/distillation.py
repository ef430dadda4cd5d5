"""Score distillation (Poole et al. 2022, https://arxiv.org/abs/2209.14988) with a latent diffusion model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from generation.accelerate.compiled import compile_autoencoder
from generation.accelerate.cuda_graph import GraphedFunction, split_batch
from generation.accelerate.offload import Offloaded
from generation.accelerate.unet import compile_unet

# Noise levels are clamped to this part of the schedule: at its ends the model gives no useful gradient.
MIN_LEVEL, MAX_LEVEL = 0.02, 0.98


class Distillation:
    """Scores renders of many scenes in one call, given a model's noise prediction.

    The gradient of the loss by the latents is (guided noise - added noise) * `_weight`.

    A condition is an opaque tensor for one scene. Conditions of several scenes are stacked along a new axis 0.
    """

    views = 1  # of one scene, that `loss` takes together

    def __init__(
        self, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: DDIMScheduler, image_size: int
    ) -> None:
        """`image_size`: pixels of the images that the models were trained on."""
        self.image_size = image_size
        self._unet = unet.eval().requires_grad_(False)
        self._vae = vae.eval().requires_grad_(False)
        self._alphas = scheduler.alphas_cumprod.to(unet.device)
        side = image_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self._latent_shape = (vae.config.latent_channels, side, side)
        self._step = GraphedFunction(self._distil)
        self._networks = nn.ModuleList([self._unet, self._vae])  # that are offloaded; a subclass adds its own
        self._offloaded = Offloaded(self._networks, unet.device)
        self._is_compiled = False

    def _guided_noise(
        self, noisy: Tensor, t: Tensor, camera_to_world: Tensor, conditions: Tensor, scale: float
    ) -> Tensor:
        """Classifier-free guidance: the unconditional noise, plus `scale` times what the condition adds."""
        raise NotImplementedError

    def _any_condition(self) -> Tensor:
        """A condition of one scene, for its shape."""
        raise NotImplementedError

    def _weight(self, alphas: Tensor) -> Tensor | float:
        """Weight of the gradient by alpha_cumprod."""
        return 1.0

    def loss(
        self,
        render: Callable[[], Tensor],
        camera_to_world: Tensor,
        conditions: Tensor,
        noise_levels: Tensor,
        generators: list[torch.Generator],
        guidance_scale: float,
    ) -> Tensor:
        """Loss (S,) of renders (S * views, 3, H, W) in 0..1 from OpenGL poses (S * views, 4, 4).

        `render` returns the renders. It may synchronise with the device, so it is called after everything else has been
        launched. `noise_levels` (S,) are in 0..1 (1 = pure noise). Noise is drawn from each scene's own generator.
        """
        t = timesteps(noise_levels, len(self._alphas)).to(self._alphas.device)
        noise = draw_noise(generators, (self.views, *self._latent_shape), self._alphas.device)
        images = self._resize(render())
        losses, gradient = self._step(
            images.detach(), camera_to_world, conditions, t, noise, constants=(guidance_scale,)
        )
        return with_gradient(images, losses, gradient) / self.views

    def warm_up(self, scenes: int, guidance_scale: float, progress: Callable[[str], None]) -> None:
        """On a GPU, compile and capture `loss` for up to `scenes` scenes at this scale. Else do nothing."""
        device = self._unet.device
        if device.type != "cuda":
            return
        from generation.accelerate.fused import fuse_encoder  # needs Triton, which comes with torch for GPUs

        if not self._is_compiled:  # another generator may share it
            compile_unet(self._unet)
            fuse_encoder(self._vae)
            compile_autoencoder(self._vae)
            self._is_compiled = True
            self._offloaded = Offloaded(self._networks, device)  # they have other parameters now
        condition = self._any_condition()
        for count in range(scenes, 0, -1):
            progress(f"compiling {type(self).__name__} for {count} of {scenes} at once")
            images = self.views * count
            self._step.capture(
                torch.rand(images, 3, self.image_size, self.image_size, device=device),
                torch.eye(4, device=device).repeat(images, 1, 1),
                torch.stack([condition] * count),
                torch.full((count,), len(self._alphas) // 2, device=device),
                torch.randn(images, *self._latent_shape, device=device),
                constants=(guidance_scale,),
            )

    def offload(self) -> None:
        """See `generation.generators.base.Generator.offload`."""
        self._step.forget()
        self._offloaded.offload()

    def onload(self) -> None:
        """See `generation.generators.base.Generator.onload`."""
        self._offloaded.onload()

    def _distil(
        self, images: Tensor, camera_to_world: Tensor, conditions: Tensor, t: Tensor, noise: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Losses (S,), and their gradient by the images (S * views, 3, image_size, image_size)."""
        results = []
        for scenes in split_batch(len(t)):
            views = slice(scenes.start * self.views, scenes.stop * self.views)
            steps, added = t[scenes].repeat_interleave(self.views), noise[views].to(self._unet.dtype)
            a = self._alphas[steps].view(-1, 1, 1, 1).to(added)
            known, poses = conditions[scenes], camera_to_world[views]

            def direction(latents: Tensor, a=a, added=added, steps=steps, poses=poses, known=known) -> Tensor:
                noisy = a.sqrt() * latents + (1 - a).sqrt() * added
                return self._weight(a) * (self._guided_noise(noisy, steps, poses, known, scale) - added)

            results.append(distil(images[views], self._latents, direction, scenes.stop - scenes.start))
        losses, gradients = zip(*results, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def _resize(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def _latents(self, images: Tensor) -> Tensor:
        """Scaled latents of images of the model's size."""
        return self._encode(images) * self._vae.config.scaling_factor

    def _encode(self, images: Tensor) -> Tensor:
        return self._vae.encode((images * 2 - 1).to(self._vae.dtype)).latent_dist.mode()


def timesteps(levels: Tensor, count: int) -> Tensor:
    """The steps (S,) of a schedule of `count` that stand for noise levels in 0..1, rounded as DreamGaussian does."""
    return (levels.double() * count).round().clamp(int(MIN_LEVEL * count), int(MAX_LEVEL * count)).long()


def draw_noise(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise (S * shape[0], *shape[1:]) of which each scene draws its part from its own generator."""
    return torch.cat([torch.randn(shape, generator=g, device=g.device) for g in generators]).to(device)


def distil(
    images: Tensor, encode: Callable[[Tensor], Tensor], direction: Callable[[Tensor], Tensor], scenes: int
) -> tuple[Tensor, Tensor]:
    """Losses (S,), and their gradient by `images` (S * views, 3, H, W).

    The gradient by the latents, `encode(images)`, is `direction(latents)`, with NaN as 0. Nothing in here synchronises
    with the device, and no autograd graph remains, so it can be captured as a CUDA graph.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        latents = encode(images)
    with torch.no_grad():
        wanted = torch.nan_to_num(direction(latents.detach()))
        losses = 0.5 * wanted.float().square().reshape(scenes, -1).sum(1)
    (gradient,) = torch.autograd.grad(latents, images, wanted.to(latents))
    return losses, gradient


def with_gradient(images: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
    """`losses` (S,) as a differentiable function of `images` (S * views, 3, H, W), with a precomputed `gradient`."""
    result: Tensor = _Known.apply(images, losses, gradient)
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        factors = outward[0].repeat_interleave(len(gradient) // len(outward[0]))
        return gradient * factors.view(-1, 1, 1, 1), None, None
