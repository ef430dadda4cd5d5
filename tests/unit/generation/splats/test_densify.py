"""Adaptive density control: what is cloned, split and removed, and that Adam's state follows."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from generation.splats.densify import Changes, DensityControl, densify
from generation.splats.gaussians import Gaussians

EXTENT, PERCENT_DENSE, THRESHOLD = 4.0, 0.01, 0.01
SMALL, LARGE = 0.02, 0.2  # standard deviations on either side of PERCENT_DENSE * EXTENT


def make(
    scales: list[float], opacities: list[float] | None = None, fused=False, device="cpu", **options
) -> tuple[DensityControl, Gaussians]:
    n = len(scales)
    g = torch.Generator().manual_seed(1)
    gaussians = Gaussians(
        means=torch.arange(3.0 * n).reshape(n, 3),
        quats=torch.randn(n, 4, generator=g),
        log_scales=torch.tensor(scales).log()[:, None].repeat(1, 3),
        logit_opacities=torch.logit(torch.tensor(opacities or [0.5] * n)),
        sh=torch.randn(n, 4, 3, generator=g),
    ).to(device)
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    groups = [{"params": [t], "name": k, "lr": 1e-3} for k, t in gaussians.tensors().items()]
    optimizer = torch.optim.Adam(groups, fused=fused)
    torch.stack([t.square().sum() for t in gaussians.tensors().values()]).sum().backward()
    optimizer.step()
    for tensor in gaussians.tensors().values():
        tensor.grad = None
    settings = {
        "densify_grad_threshold": THRESHOLD,
        "percent_dense": PERCENT_DENSE,
        "scene_extent": EXTENT,
        "min_opacity": 0.01,
        "max_gaussians": 1000,
    }
    return DensityControl(gaussians, optimizer, torch.Generator().manual_seed(7), **(settings | options)), gaussians


def pull(control: DensityControl, strengths: list[float], visible: list[bool] | None = None) -> None:
    """One view of 100 x 50 pixels whose gradients along x have the given lengths in normalised device units."""
    grad = torch.zeros(1, len(strengths), 2)
    grad[0, :, 0] = torch.tensor(strengths) / 50.0
    radii = torch.tensor([visible or [True] * len(strengths)]).int() * 3
    control.accumulate(grad, radii, 100, 50)


def alone(control: DensityControl) -> Changes:
    return densify([control])[0]


def test_small_pulled_gaussian_is_cloned_in_place():
    control, g = make([SMALL, SMALL])
    before = {k: v.detach().clone() for k, v in g.tensors().items()}
    pull(control, [2 * THRESHOLD, 0.0])
    assert alone(control) == (1, 0, 0)
    for name, value in g.tensors().items():
        assert torch.equal(value, before[name][[0, 1, 0]]), name


def test_large_pulled_gaussian_becomes_two_smaller_ones_within_it():
    control, g = make([LARGE, LARGE])
    before = {k: v.detach().clone() for k, v in g.tensors().items()}
    pull(control, [0.0, 2 * THRESHOLD])
    assert alone(control) == (0, 1, 0)
    assert len(g) == 3
    assert torch.equal(g.means[0], before["means"][0])
    for child in (1, 2):
        assert torch.allclose(g.log_scales[child], before["log_scales"][1] - math.log(1.6))
        distance = (g.means[child] - before["means"][1]).norm()
        assert 0 < distance < 5 * LARGE
        assert torch.equal(g.sh[child], before["sh"][1])
    assert not torch.equal(g.means[1], g.means[2])


def test_children_are_drawn_from_the_parents_distribution():
    control, g = make([LARGE] * 2000, max_gaussians=4000)
    with torch.no_grad():
        g.log_scales[:] = torch.tensor([0.3, 0.1, 0.05]).log()
        g.means[:] = 0.0
        g.quats[:] = torch.tensor([math.cos(0.4), 0.0, 0.0, math.sin(0.4)])
    pull(control, [1.0] * 2000)
    alone(control)
    R = g.rotations()[0]
    expected = R @ torch.diag(torch.tensor([0.3, 0.1, 0.05]).square()) @ R.T
    assert torch.allclose(torch.cov(g.means.detach().T), expected, atol=0.006)


@pytest.mark.parametrize("fused", [False, True])
def test_adam_moments_follow_and_start_at_zero(fused):
    control, g = make([SMALL, LARGE, SMALL], [0.5, 0.5, 0.001], fused)
    moments = {k: control.optimizer.state[v]["exp_avg"].clone() for k, v in g.tensors().items()}
    pull(control, [2 * THRESHOLD, 2 * THRESHOLD, 0.0])
    assert alone(control) == (1, 1, 1)  # rows: 0, a child of 1, a clone of 0, another child
    for name, value in g.tensors().items():
        state = control.optimizer.state[value]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == value.shape
        assert torch.equal(state["exp_avg"][0], moments[name][0])
        assert not state["exp_avg"][1:].any()
        assert not state["exp_avg_sq"][1:].any()
        assert state["step"] == 1
    assert len(control.optimizer.state) == 5


@pytest.mark.parametrize("fused", [False, True])
def test_optimiser_goes_on_with_the_new_tensors(fused):
    control, g = make([SMALL, LARGE], fused=fused)
    pull(control, [1.0, 1.0])
    alone(control)
    before = g.means.detach().clone()
    g.means.sum().backward()
    control.optimizer.step()
    assert g.means.is_leaf
    assert not torch.equal(g.means.detach(), before)
    pull(control, [0.0] * 4)
    assert alone(control) == (0, 0, 0)


def test_noting_gradients_reads_nothing_back():
    """On the meta device there are no values: whatever the host asks for is an error."""
    control, _ = make([SMALL, LARGE], device="meta")
    control.accumulate(torch.zeros(3, 2, 2, device="meta"), torch.zeros(3, 2, dtype=torch.int32, device="meta"), 8, 8)
    with pytest.raises((NotImplementedError, RuntimeError)):
        alone(control)  # which must know how many there are


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_host_waits_for_counts_alone():
    control, g = make([SMALL, LARGE] * 50, fused=True, device="cuda")
    gradient = torch.full((1, 100, 2), THRESHOLD, device="cuda")
    radii = torch.ones(1, 100, dtype=torch.int32, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        control.accumulate(gradient, radii, 100, 100)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            alone(control)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(g) == 200
    assert len(waits) <= 1, [str(w.message) for w in waits]


def test_gradient_is_measured_in_device_units_and_for_visible_views_alone():
    # 0.0003 a pixel is 0.015 in device units across 100 pixels, and 0.0075 across 50.
    for width, height, axis, expected in [(100, 50, 0, 1), (100, 50, 1, 0), (50, 100, 1, 1)]:
        control, _ = make([SMALL])
        grad = torch.zeros(2, 1, 2)
        grad[0, 0, axis] = 0.0003
        control.accumulate(grad, torch.tensor([[2], [0]]), width, height)  # the second view does not see it
        assert alone(control).cloned == expected
    control, _ = make([SMALL])
    grad = torch.tensor([[[0.0003, 0.0]], [[0.0, 0.0]]])
    control.accumulate(grad, torch.tensor([[2], [2]]), 100, 50)  # now the mean of two views is 0.0075
    assert alone(control).cloned == 0


def test_never_visible_gaussians_are_left_alone():
    control, g = make([SMALL, LARGE])
    pull(control, [1.0, 1.0], visible=[False, False])
    assert alone(control) == (0, 0, 0)
    assert len(g) == 2


def test_transparent_and_oversized_gaussians_are_removed():
    control, g = make([SMALL, SMALL, 0.5 * EXTENT], [0.5, 0.005, 0.5])
    assert alone(control) == (0, 0, 2)
    assert len(g) == 1


def test_several_together_become_what_each_becomes_alone():
    def controls():
        made = [make([SMALL, LARGE, SMALL], [0.5, 0.5, 0.005]), make([LARGE, SMALL]), make([SMALL])]
        for control, strengths in zip((c for c, _ in made), ([1.0, 1.0, 0.0], [1.0, 0.0], [0.0]), strict=True):
            pull(control, strengths)
        return made

    together, others = controls(), controls()
    changes = densify([control for control, _ in together])
    assert changes == [alone(control) for control, _ in others] == [(1, 1, 1), (0, 1, 0), (0, 0, 0)]
    for (_, ours), (_, theirs) in zip(together, others, strict=True):
        for name, tensor in theirs.tensors().items():
            assert torch.equal(ours.tensors()[name], tensor)
    assert densify([]) == []


def test_cap_prefers_the_most_pulled():
    control, g = make([SMALL] * 4, max_gaussians=6)
    means = g.means.detach().clone()
    pull(control, [0.02, 0.04, 0.03, 0.05])
    assert alone(control) == (2, 0, 0)
    assert torch.equal(g.means[4:], means[[1, 3]])
    pull(control, [1.0] * 6)
    assert alone(control) == (0, 0, 0)


def test_equal_seeds_give_equal_results():
    results = []
    for _ in range(2):
        control, g = make([LARGE, SMALL, LARGE])
        pull(control, [1.0, 1.0, 1.0])
        alone(control)
        results.append(g.means.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("fused", [False, True])
def test_opacity_reset_keeps_low_ones_and_clears_momentum(fused):
    control, g = make([SMALL, SMALL], [0.9, 0.001], fused)
    low = g.logit_opacities[1].item()
    control.reset_opacity()
    assert g.logit_opacities.sigmoid()[0].item() == pytest.approx(0.01)
    assert g.logit_opacities[1].item() == low
    state = control.optimizer.state[g.logit_opacities]
    assert not state["exp_avg"].any()
    assert state["step"] == 1
    assert control.optimizer.state[g.means]["exp_avg"].any()


def test_all_gaussians_removed_and_none_to_begin_with():
    control, g = make([SMALL, SMALL], [0.001, 0.001])
    assert alone(control).pruned == 2
    assert len(g) == 0
    assert g.sh.shape == (0, 4, 3)
    control.accumulate(torch.zeros(1, 0, 2), torch.zeros(1, 0).int(), 10, 10)
    assert alone(control) == (0, 0, 0)


def test_foreign_optimiser_is_refused():
    control, g = make([SMALL])
    nameless = torch.optim.Adam([g.means])
    with pytest.raises(ValueError, match="no group named 'means'"):
        DensityControl(
            g, nameless, torch.Generator(),
            densify_grad_threshold=1, percent_dense=1, scene_extent=1, min_opacity=0, max_gaussians=1,
        )  # fmt: skip
    g.means = g.means.detach().clone()
    with pytest.raises(ValueError, match="'means' does not hold"):
        DensityControl(
            g, control.optimizer, torch.Generator(),
            densify_grad_threshold=1, percent_dense=1, scene_extent=1, min_opacity=0, max_gaussians=1,
        )  # fmt: skip
