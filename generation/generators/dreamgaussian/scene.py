"""One optimisation in progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.dreamgaussian.plan import Plan
from generation.generators.dreamgaussian.schedule import position_lr
from generation.splats.densify import DensityControl, densify
from generation.splats.gaussians import Gaussians

# DreamGaussian's constants of density control, which its configs do not name.
SCENE_EXTENT = 4.0
MIN_OPACITY = 0.01


@dataclass(frozen=True)
class Views:
    """Target cut-outs of a scene."""

    premultiplied: Tensor  # (V, 3, S, S) colour times alpha
    alpha: Tensor  # (V, 1, S, S) in 0..1

    def at(self, size: int) -> Views:
        """A copy, resized to `size` x `size` pixels."""
        if size == self.alpha.shape[-1]:
            return self
        return Views(*(F.interpolate(t, size=(size, size), mode="area") for t in (self.premultiplied, self.alpha)))


class Scene:
    """One optimisation: Gaussians, their optimiser, target views, and the scene's own random generators."""

    def __init__(
        self,
        gaussians: Gaussians,
        known: Views,
        plan: Plan,
        condition: Tensor | None,
        image_condition: Tensor | None,
        options: DreamGaussianOptions,
        generator: torch.Generator,
    ) -> None:
        """`condition` and `image_condition` are those of the text and the image guidance.

        `generator` draws the seed of the guidance's noise, which is generated on the device, and then the random
        numbers of the density control.
        """
        device = gaussians.means.device
        self.plan = plan
        self.condition = condition
        self.image_condition = image_condition
        self.noise = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        # Known views by render size. Neither renders nor views are upscaled for the comparison.
        self._known = {size: known.at(min(size, known.alpha.shape[-1])) for size in set(plan.sizes)}
        self.iteration = 0
        self._options = options
        self._gaussians = gaussians
        for tensor in gaussians.tensors().values():
            tensor.requires_grad_(True)
        rates = {
            "means": options.position_lr_init,
            "quats": options.rotation_lr,
            "log_scales": options.scaling_lr,
            "logit_opacities": options.opacity_lr,
            "sh": options.feature_lr,
        }
        groups = [{"params": [t], "lr": rates[name], "name": name} for name, t in gaussians.tensors().items()]
        self._optimiser = torch.optim.Adam(groups, lr=0.0, eps=1e-15, fused=True)
        self._density = DensityControl(
            gaussians,
            self._optimiser,
            generator,
            densify_grad_threshold=options.densify_grad_threshold,
            percent_dense=options.percent_dense,
            scene_extent=SCENE_EXTENT,
            min_opacity=MIN_OPACITY,
            max_gaussians=options.max_gaussians,
        )

    @property
    def fraction(self) -> float:
        return self.iteration / self._options.iters

    @property
    def done(self) -> bool:
        return self.iteration >= self._options.iters

    def known_views(self) -> tuple[Views, Tensor]:
        """The known views of this iteration, and the weights (K,) of their losses."""
        i = self.iteration
        views, which = self._known[self.plan.sizes[i]], self.plan.known[i]
        return Views(views.premultiplied[which], views.alpha[which]), self.plan.weights[i]

    def gaussians(self) -> Gaussians:
        """The Gaussians as they are now; the tensors are the optimised ones, not copies."""
        return self._gaussians

    def so_far(self) -> Gaussians:
        """As ``gaussians``."""
        return self._gaussians

    def harmonics(self) -> Tensor:
        """Spherical harmonics (N, K - 1, 3) without the constant: a view, not a copy."""
        return self._gaussians.sh.detach()[:, 1:]

    def optimiser(self) -> torch.optim.Adam:
        """The optimiser, with this iteration's learning rates."""
        o = self._options
        for group in self._optimiser.param_groups:
            if group["name"] == "means":
                group["lr"] = position_lr(
                    self.iteration + 1, o.position_lr_init, o.position_lr_final, o.position_lr_max_steps
                )
        return self._optimiser

    def _accumulate(self, means2d_grad: Tensor | None, radii: Tensor) -> bool:
        """Accumulate gradients for density control. Returns whether it is active in this iteration."""
        o = self._options
        size = self.plan.sizes[self.iteration]
        self.iteration += 1
        self._optimiser.zero_grad(set_to_none=True)
        if not o.density_start_iter <= self.iteration <= o.density_end_iter or means2d_grad is None:
            return False
        self._density.accumulate(means2d_grad, radii, size, size)
        return True


def advance(scenes: Sequence[Scene], gradients: Sequence[tuple[Tensor | None, Tensor]]) -> None:
    """End an iteration whose optimiser step is done: density control where it is due.

    `gradients` has for each scene the gradient (C, N, 2) by projected centres and the radii (C, N), of the renders that
    drive densification.
    """
    controlled = [scene for scene, each in zip(scenes, gradients, strict=True) if scene._accumulate(*each)]
    densify([s._density for s in controlled if s.iteration % s._options.densification_interval == 0])
    for scene in controlled:
        if scene.iteration % scene._options.opacity_reset_interval == 0:
            scene._density.reset_opacity()
