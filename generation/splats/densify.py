"""Adaptive density control of 3DGS (Kerbl et al. 2023, section 5), with the names that DreamGaussian's configs use.

Gaussians with a large gradient by their projected centres are under-reconstructed: small ones are cloned, large ones
split in two. Nearly transparent and too large ones are removed. The optimiser's state is edited along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from generation.splats.gaussians import Gaussians

SPLIT_SHRINK = 1.6  # a split Gaussian's two children are this much smaller
MAX_EXTENT_SHARE = 0.1  # of the scene's extent; larger Gaussians are removed
RESET_OPACITY = 0.01


class Changes(NamedTuple):
    """How many Gaussians one call of `densify` touched; a split one counts once."""

    cloned: int
    split: int
    pruned: int


class Choice(NamedTuple):
    """Which of N Gaussians are split, and which of them and then of their clones and second children remain (2 N)."""

    split: Tensor
    kept: Tensor
    counts: Tensor  # (3,): of clones, of split Gaussians, of all that remain


@torch.no_grad()
def densify(controls: Sequence[DensityControl]) -> list[Changes]:
    """Clone, split and remove by the gradients accumulated since the last call, and reset them.

    Remaining Gaussians keep their order, with the first child of a split one in its place. Clones and second children
    follow. The host waits for the device once, for the counts of all.
    """
    if not controls:
        return []
    choices = [control._choose() for control in controls]
    counts = torch.stack([choice.counts for choice in choices]).tolist()
    return [control._change(choice, *each) for control, choice, each in zip(controls, choices, counts, strict=True)]


class DensityControl:
    """Edits `gaussians` and the state of the Adam that optimises them, both in place.

    The optimiser has one group for each field of Gaussians, whose "name" is the field's and whose only parameter is the
    field's tensor; ValueError otherwise. After an edit the fields are new leaf tensors.

    densify_grad_threshold: mean length of the loss's gradient by a projected centre, in normalised device units (the
        image is 2 wide and 2 high, whatever its pixels), from which a Gaussian is cloned or split.
    percent_dense: standard deviation, as a share of scene_extent, above which it is split and not cloned.
    scene_extent: world units.
    min_opacity: Gaussians under it are removed. (DreamGaussian names a largest radius in pixels, too, yet always clears
        its radii before it compares them.)
    max_gaussians: never more than this; where there is room for some alone, the largest gradients go first.
    generator: draws the places of split Gaussians' children, so that equal seeds give equal results.
    """

    def __init__(
        self,
        gaussians: Gaussians,
        optimizer: torch.optim.Adam,
        generator: torch.Generator,
        *,
        densify_grad_threshold: float,
        percent_dense: float,
        scene_extent: float,
        min_opacity: float,
        max_gaussians: int,
    ) -> None:
        self.gaussians = gaussians
        self.optimizer = optimizer
        self.generator = generator
        self.densify_grad_threshold = densify_grad_threshold
        self.percent_dense = percent_dense
        self.scene_extent = scene_extent
        self.min_opacity = min_opacity
        self.max_gaussians = max_gaussians
        self._groups = {group.get("name"): group for group in optimizer.param_groups}
        for name, tensor in gaussians.tensors().items():
            if name not in self._groups:
                raise ValueError(f"the optimiser has no group named {name!r}")
            if len(self._groups[name]["params"]) != 1 or self._groups[name]["params"][0] is not tensor:
                raise ValueError(f"the optimiser's group {name!r} does not hold the Gaussians' {name} alone")
        self._clear()

    def _clear(self) -> None:
        means = self.gaussians.means
        self._gradient = means.new_zeros(len(means))
        self._seen = means.new_zeros(len(means))

    @torch.no_grad()
    def accumulate(self, means2d_grad: Tensor, radii: Tensor, width: int, height: int) -> None:
        """Note one step's gradients by `info["means2d"]` (C, N, 2), in pixels, and radii (C, N); 0 = not visible.

        Called in every iteration, it never makes the host wait for the device.
        """
        x, y = means2d_grad.unbind(dim=-1)
        visible = radii > 0
        if width != height:
            x = x * (width / height)
        self._gradient.add_((torch.hypot(x, y) * visible).sum(dim=0), alpha=height / 2.0)
        self._seen += visible.sum(dim=0)

    def _choose(self) -> Choice:
        """Choose by the accumulated gradients, without synchronising with the device."""
        g = self.gaussians
        n, device = len(g), g.means.device
        gradient = self._gradient / self._seen.clamp_min(1.0)
        by_gradient = torch.argsort(gradient, descending=True, stable=True)[: max(self.max_gaussians - n, 0)]
        chosen = torch.zeros(n, dtype=torch.bool, device=device).index_fill_(0, by_gradient, True)
        chosen &= gradient >= self.densify_grad_threshold
        largest = g.log_scales.amax(dim=1).exp()
        split = chosen & (largest > self.percent_dense * self.scene_extent)

        largest = torch.where(split, largest / SPLIT_SHRINK, largest)
        keep = g.logit_opacities.sigmoid() >= self.min_opacity
        keep &= largest <= MAX_EXTENT_SHARE * self.scene_extent
        kept = torch.cat([keep, keep & chosen])
        return Choice(split, kept, torch.stack([(chosen & ~split).sum(), split.sum(), kept.sum()]))

    def _change(self, choice: Choice, cloned: int, parents: int, count: int) -> Changes:
        """`count` Gaussians remain."""
        g = self.gaussians
        n = len(g)
        rows = torch.nonzero_static(choice.kept, size=count)[:, 0]
        source = rows % n
        is_child = choice.split[source]
        values = {name: tensor.detach()[source] for name, tensor in g.tensors().items()}
        offsets = self._offsets(Gaussians(**values))
        values["means"] += torch.where(is_child[:, None], offsets, 0.0)
        values["log_scales"] -= is_child[:, None] * math.log(SPLIT_SHRINK)
        self._replace(values, source, (rows >= n) | is_child)
        self._clear()
        return Changes(cloned, parents, n + cloned + parents - count)

    def _offsets(self, gaussians: Gaussians) -> Tensor:
        """A place (N, 3) for each Gaussian, relative to its centre, drawn from its own distribution."""
        device = gaussians.means.device
        seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
        own = torch.Generator(device=device).manual_seed(seed)  # draws on the device: nothing is copied to it
        noise = torch.randn(len(gaussians), 3, generator=own, device=device)
        return (gaussians.rotations() @ (noise * gaussians.log_scales.exp())[:, :, None])[:, :, 0]

    @torch.no_grad()
    def reset_opacity(self) -> None:
        """Lower every opacity to at most 0.01 and forget its momentum; what the views need grows back."""
        limit = math.log(RESET_OPACITY / (1.0 - RESET_OPACITY))
        self.gaussians.logit_opacities.clamp_(max=limit)
        for value in self.optimizer.state[self.gaussians.logit_opacities].values():
            if isinstance(value, Tensor) and value.ndim:
                value.zero_()

    def _replace(self, values: dict[str, Tensor], source: Tensor, is_new: Tensor) -> None:
        """Put new leaf tensors in place; the moments of row i come from row source[i], or are zero where new."""
        for name, value in values.items():
            old = getattr(self.gaussians, name)
            parameter = value.contiguous().requires_grad_(old.requires_grad)
            state = self.optimizer.state.pop(old, None)
            if state is not None:
                for key, moment in state.items():
                    if isinstance(moment, Tensor) and moment.ndim:  # not the count of steps
                        new = is_new.view(-1, *(1,) * (moment.ndim - 1))
                        state[key] = moment[source].masked_fill_(new, 0.0)
                self.optimizer.state[parameter] = state
            self._groups[name]["params"][0] = parameter
            setattr(self.gaussians, name, parameter)
