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
    """Cut-outs that the scene should look like."""

    premultiplied: Tensor  # (V, 3, S, S) colour times alpha
    alpha: Tensor  # (V, 1, S, S) in 0..1

    def at(self, size: int) -> Views:
        """The same, `size` pixels wide and high."""
        if size == self.alpha.shape[-1]:
            return self
        return Views(*(F.interpolate(t, size=(size, size), mode="area") for t in (self.premultiplied, self.alpha)))


class Scene:
    """Gaussians, their optimiser, what they should look like, and random generators of their own."""

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
        """`condition` and `image_condition` are those of the guidances that look at it.

        `generator` draws the seed of the guidance's noise, which is made where the Gaussians are, and goes on with what
        the density control needs.
        """
        device = gaussians.means.device
        self.plan = plan
        self.condition = condition
        self.image_condition = image_condition
        self.noise = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        # Pixels of the known views to compare renders with, those at which neither side is made larger.
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
        """Those to compare this iteration's renders with, and the weights (K,) of their losses."""
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
        """(N, K - 1, 3) of the Gaussians' colours, all but the constant; what is done to it is done to them."""
        return self._gaussians.sh.detach()[:, 1:]

    def optimiser(self) -> torch.optim.Adam:
        """With this iteration's learning rates."""
        o = self._options
        for group in self._optimiser.param_groups:
            if group["name"] == "means":
                group["lr"] = position_lr(
                    self.iteration + 1, o.position_lr_init, o.position_lr_final, o.position_lr_max_steps
                )
        return self._optimiser

    def _count(self, means2d_grad: Tensor | None, radii: Tensor) -> bool:
        """See `advance`; whether the density is controlled in this iteration."""
        o = self._options
        size = self.plan.sizes[self.iteration]
        self.iteration += 1
        self._optimiser.zero_grad(set_to_none=True)
        if not o.density_start_iter <= self.iteration <= o.density_end_iter or means2d_grad is None:
            return False
        self._density.accumulate(means2d_grad, radii, size, size)
        return True


def advance(scenes: Sequence[Scene], pulls: Sequence[tuple[Tensor | None, Tensor]]) -> None:
    """End an iteration whose optimiser step is done: density control where it is due.

    Each scene's pull is that of the renders that drive densification: the gradient (C, N, 2) by projected centres, and
    radii (C, N).
    """
    controlled = [scene for scene, pull in zip(scenes, pulls, strict=True) if scene._count(*pull)]
    densify([s._density for s in controlled if s.iteration % s._options.densification_interval == 0])
    for scene in controlled:
        if scene.iteration % scene._options.opacity_reset_interval == 0:
            scene._density.reset_opacity()
