"""One optimisation in progress."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from generation.dreamgaussian.schedule import position_lr
from generation.settings import DreamGaussianOptions
from generation.splats.cameras import Cameras
from generation.splats.densify import DensityControl
from generation.splats.gaussians import Gaussians

# DreamGaussian's constants of density control, which its configs do not name.
SCENE_EXTENT = 4.0
MIN_OPACITY = 0.01


@dataclass(frozen=True)
class View:
    """Cut-outs that the scene should look like, from known cameras."""

    premultiplied: Tensor  # (V, 3, H, W) colour times alpha
    alpha: Tensor  # (V, 1, H, W) in 0..1
    cameras: Cameras


class Scene:
    """Gaussians, their optimiser, what they should look like, and a random generator of their own."""

    def __init__(
        self,
        gaussians: Gaussians,
        reference: View,
        sampled: View | None,
        condition: Tensor | None,
        options: DreamGaussianOptions,
        generator: torch.Generator,
        image_condition: Tensor | None = None,
    ) -> None:
        """`condition` and `image_condition` are those of the guidances that look at it."""
        self.reference = reference
        self.sampled = sampled
        self.condition = condition
        self.image_condition = image_condition
        self.generator = generator
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
        self._optimiser = torch.optim.Adam(groups, lr=0.0, eps=1e-15)
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
    def done(self) -> bool:
        return self.iteration >= self._options.iters

    @property
    def step_ratio(self) -> float:
        return min(1.0, self.iteration / self._options.iters)

    def gaussians(self) -> Gaussians:
        """The Gaussians as they are now; the tensors are the optimised ones, not copies."""
        return self._gaussians

    def update(self, means2d_grad: Tensor | None, radii: Tensor, width: int, height: int) -> None:
        """One optimiser step from the gradients at hand, then density control when it is due.

        `means2d_grad` (C, N, 2) and `radii` (C, N) are of the renders, `width` x `height`, that drive densification.
        """
        o = self._options
        for group in self._optimiser.param_groups:
            if group["name"] == "means":
                group["lr"] = position_lr(
                    self.iteration, o.position_lr_init, o.position_lr_final, o.position_lr_max_steps
                )
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        if not o.density_start_iter <= self.iteration <= o.density_end_iter or means2d_grad is None:
            return
        self._density.accumulate(means2d_grad, radii, width, height)
        if self.iteration % o.densification_interval == 0:
            self._density.densify_and_prune()
        if self.iteration % o.opacity_reset_interval == 0:
            self._density.reset_opacity()
