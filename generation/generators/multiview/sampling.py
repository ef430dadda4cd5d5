"""DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502) of several objects' views, one step per call.

Objects may be at different time steps in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from generation.accelerate.cuda_graph import GraphedFunction, split_batch
from generation.accelerate.pinned import copy_async
from generation.weights import WeightsError


@dataclass(eq=False)
class ViewSampling:
    """The sampling of one object's views."""

    latents: Tensor  # (V, C, h, w), float32
    words: Tensor  # (2, L, C) text states: negative, then positive
    known: tuple[Tensor, ...]  # what the sampler's `Frames` needs: of a known view or of the picture
    steps: int  # in all
    at: int = 0  # steps done

    @property
    def done(self) -> bool:
        return self.at >= self.steps

    @property
    def fraction(self) -> float:
        """Progress, 0..1."""
        return self.at / self.steps


class Schedule(NamedTuple):
    """For each of n steps: the time step, and alpha_cumprod before and after it, each (n,)."""

    t: Tensor
    signal: Tensor
    signal_after: Tensor

    @classmethod
    def of(cls, scheduler: DDIMScheduler, steps: int, device: torch.device | str) -> Schedule:
        """Raises WeightsError for a scheduler of another kind than Stable Diffusion's."""
        config = scheduler.config
        usual = {"prediction_type": "epsilon", "clip_sample": False, "thresholding": False}
        if other := [f"{key} {config[key]}" for key, value in usual.items() if config[key] != value]:
            raise WeightsError(f"the scheduler's config has {', '.join(other)}, which is not supported")
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps.cpu()
        after = t - config.num_train_timesteps // steps
        left = scheduler.alphas_cumprod[after.clamp_min(0)]
        left = torch.where(after >= 0, left, scheduler.final_alpha_cumprod)
        return cls(*(each.to(device) for each in (t, scheduler.alphas_cumprod[t], left)))


#: From latents (S, V, C, h, w), their time steps (S,), their shares of signal (S, 1, 1, 1, 1) and what is known of
#: them: what the UNet sees without the condition and with it, (2, S, F, C, h, w), and at which time steps, (2, S, F).
#: The first V of the frames are the views.
Frames = Callable[..., tuple[Tensor, Tensor]]

#: From what the UNet sees (2, S * F, C, h, w), time steps (2, S * F) and words (S, 2, L, C) the guided noise
#: (S * F, C, h, w).
GuidedNoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def views_only(latents: Tensor, t: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """`Frames` without any but the views."""
    return latents.expand(2, *latents.shape), t[:, None].expand(2, *latents.shape[:2])


def known_frame(index: int) -> Frames:
    """`Frames` in which the view at `index` is known: its latents (S, C, h, w), and the noise (S, C, h, w) for it.

    For a model that was trained with a noise-free view at time step 0. In the unconditional half the view is noisy as
    the others, so guidance is towards it, too.
    """

    def frames(latents: Tensor, t: Tensor, signal: Tensor, known: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        both, at = (each.clone() for each in views_only(latents, t, signal))
        a = signal[:, 0]
        both[0, :, index] = a.sqrt() * known + (1 - a).sqrt() * noise
        both[1, :, index], at[1, :, index] = known, 0
        return both, at

    return frames


def guided_noise(
    unet: UNet2DConditionModel, both: Tensor, t: Tensor, cameras: Tensor, words: Tensor, scale: float
) -> Tensor:
    """`GuidedNoise` with `cameras` (S * F, 16): the unconditional noise, plus `scale` times what the text adds."""
    words = words.to(unet.dtype)
    (noise,) = unet(
        both.flatten(0, 1).to(unet.dtype),
        t.flatten(),
        torch.cat([words[:, 0], words[:, 1]]),
        class_labels=cameras.to(unet.dtype).repeat(2, 1),
        return_dict=False,
    )
    without, given = noise.chunk(2)
    return without + scale * (given - without)


class Sampler:
    """Advances several samplings in one batch."""

    def __init__(self, schedule: Schedule, guided: GuidedNoise, frames: Frames = views_only) -> None:
        self.steps = len(schedule.t)
        self._schedule = schedule
        self._guided = guided
        self._frames = frames
        self.captured = GraphedFunction(self._denoise)

    def capture(self, sampling: ViewSampling, size: int) -> None:
        """Compile and capture a step of so many samplings of this one's shape."""
        self.captured.capture(*self._inputs([sampling] * size))

    @torch.no_grad()
    def step(self, samplings: Sequence[ViewSampling]) -> None:
        """One denoising step of all. If it fails, none has changed. Raises ValueError for one that is done."""
        # Its index would be out of range, which is fatal on a GPU.
        if any(sampling.done for sampling in samplings):
            raise ValueError("a sampling that is done has no further step")
        latents = []
        for some in split_batch(len(samplings)):
            (after,) = self.captured(*self._inputs(samplings[some]))
            latents += list(after)
        for sampling, after in zip(samplings, latents, strict=True):
            sampling.latents, sampling.at = after, sampling.at + 1

    def _inputs(self, samplings: Sequence[ViewSampling]) -> list[Tensor]:
        at = torch.tensor([sampling.at for sampling in samplings])
        known = zip(*(sampling.known for sampling in samplings), strict=True)
        return [
            torch.stack([sampling.latents for sampling in samplings]),
            copy_async(at, self._schedule.t.device),
            torch.stack([sampling.words for sampling in samplings]),
            *(torch.stack(each) for each in known),
        ]

    def _denoise(self, latents: Tensor, at: Tensor, words: Tensor, *known: Tensor) -> tuple[Tensor]:
        """Latents (S, V, C, h, w) at step `at` (S,), advanced by one step."""
        signal, after = (each[at].view(-1, 1, 1, 1, 1) for each in (self._schedule.signal, self._schedule.signal_after))
        both, t = self._frames(latents, self._schedule.t[at], signal, *known)
        noise = self._guided(both.flatten(1, 2), t.flatten(1, 2), words).unflatten(0, both.shape[1:3])
        noise = noise[:, : latents.shape[1]].to(latents)
        clean = (latents - (1 - signal).sqrt() * noise) / signal.sqrt()
        return (after.sqrt() * clean + (1 - after).sqrt() * noise,)
