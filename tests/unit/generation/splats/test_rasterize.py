"""The CPU kernel against the written-out reference, in values and gradients, and at the edges of its input."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.splats.cameras import Cameras, orbit
from generation.splats.gaussians import SH_COEFFICIENTS, Gaussians
from generation.splats.rasterize import cpu, rasterize, warm_up
from tests.support.reference_rasterizer import render
from tests.support.tensors import gradient

FIELDS = ["means", "quats", "log_scales", "logit_opacities", "sh"]


def scene(n: int, coefficients: int = 1, seed: int = 0, scale: float = -2.5, opacity: float = 0.0) -> Gaussians:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return Gaussians(
        means=0.5 * normal(n, 3),
        quats=2.0 * normal(n, 4),
        log_scales=scale + 0.8 * normal(n, 3),
        logit_opacities=opacity + 2.0 * normal(n),
        sh=0.5 * normal(n, coefficients, 3),
    )


def single(**values) -> Gaussians:
    """One opaque, round, grey Gaussian at the origin, but for `values`."""
    fields = {
        "means": [0.0, 0.0, 0.0],
        "quats": [1.0, 0.0, 0.0, 0.0],
        "log_scales": [-2.0, -2.0, -2.0],
        "logit_opacities": 5.0,
        "sh": [[0.0, 0.0, 0.0]],
    } | values
    return Gaussians(**{name: torch.tensor([value]) for name, value in fields.items()})


def compare(gaussians: Gaussians, cameras: Cameras, width: int, height: int, seed: int = 0) -> float:
    """Values to 1e-4, and gradients of a random linear loss to a thousandth of the largest, by every input.

    Returns the share of pixels that the reference is sure of; the others are left out.
    """
    g = torch.Generator().manual_seed(seed)
    background = torch.rand(len(cameras), 3, generator=g).requires_grad_()
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    rgb, alpha, info = rasterize(gaussians, cameras, width, height, background)

    fields = {k: v.detach().double().requires_grad_() for k, v in gaussians.tensors().items()}
    background64 = background.detach().double().requires_grad_()
    rgb64, alpha64, means2d64, doubtful = render(fields, cameras, width, height, background64)
    sure = ~doubtful[..., None]
    if not sure.any():
        return 0.0
    assert (rgb - rgb64)[sure.expand_as(rgb)].abs().max() < 1e-4
    assert (alpha - alpha64)[sure].abs().max() < 1e-4

    weights_rgb = torch.randn(rgb.shape, generator=g) * sure
    weights_alpha = torch.randn(alpha.shape, generator=g) * sure
    loss = (rgb * weights_rgb).sum() + (alpha * weights_alpha).sum()
    loss64 = (rgb64 * weights_rgb).sum() + (alpha64 * weights_alpha).sum()
    grads = torch.autograd.grad(loss, [*gaussians.tensors().values(), background, info["means2d"]])
    grads64 = torch.autograd.grad(loss64, [*fields.values(), background64, *means2d64])
    expected = [*grads64[:6], torch.stack(grads64[6:])]
    for name, ours, theirs in zip([*FIELDS, "background", "means2d"], grads, expected, strict=True):
        assert torch.isfinite(ours).all(), name
        if theirs.numel():
            error, largest = (ours - theirs).abs().max(), theirs.abs().max()
            assert error <= 1e-3 * largest + 1e-5, f"{name}: off by {error:.2e}, the largest is {largest:.2e}"
    return sure.float().mean().item()


@pytest.mark.parametrize("coefficients", SH_COEFFICIENTS)
def test_values_and_gradients_of_every_harmonics_degree(coefficients):
    cameras = orbit(torch.tensor([0.0, 20.0, -40.0]), torch.tensor([10.0, 100.0, 200.0]), 1.6, 49.1, 20, 27)
    assert compare(scene(60, coefficients, seed=coefficients), cameras, 20, 27) > 0.8


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(0, 40),
    coefficients=st.sampled_from(SH_COEFFICIENTS),
    seed=st.integers(0, 2**32),
    scale=st.floats(-8.0, 0.0),
    opacity=st.floats(-6.0, 6.0),
    elevation=st.floats(-90.0, 90.0),
    radius=st.floats(0.1, 6.0),
    fovy=st.floats(10.0, 120.0),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
)
def test_random_scenes(n, coefficients, seed, scale, opacity, elevation, radius, fovy, width, height):
    """Cameras stand outside of the scene or within it, so that some Gaussians are behind them or cut by the border."""
    cameras = orbit(elevation, torch.tensor([0.0, 123.0]), radius, fovy, width, height)
    compare(scene(n, coefficients, seed, scale, opacity), cameras, width, height, seed)


def test_opaque_layers_end_blending_early():
    """Hundreds of nearly opaque Gaussians behind one another: the tile stops long before its list ends."""
    gaussians = scene(400, seed=3, scale=-1.5, opacity=6.0)
    assert compare(gaussians, orbit(10.0, 30.0, 2.5, 49.1, 24, 24), 24, 24) > 0.8


def test_clamped_alpha_has_no_gradient_by_opacity():
    gaussians = single(logit_opacities=12.0, log_scales=[5.0, 5.0, 5.0], means=[0.0, 0.0, -30.0])
    gaussians.logit_opacities.requires_grad_()
    _, alpha, _ = rasterize(gaussians, orbit(0.0, 0.0, 2.0, 20.0, 4, 4), 4, 4, torch.zeros(3))
    assert alpha[0, 1, 1, 0].item() == pytest.approx(0.999)
    alpha[0, 1, 1, 0].backward()
    assert gradient(gaussians.logit_opacities).item() == 0.0


def test_centre_pixel_of_one_gaussian_by_hand():
    gaussians = single(sh=[[1.0, 0.0, -1.0]], logit_opacities=0.0)
    rgb, alpha, info = rasterize(gaussians, orbit(0.0, 0.0, 2.0, 49.1, 5, 5), 5, 5, torch.tensor([0.0, 0.0, 1.0]))
    assert info["means2d"][0, 0].tolist() == pytest.approx([2.5, 2.5])
    assert info["depths"][0, 0].item() == pytest.approx(2.0)
    assert alpha[0, 2, 2, 0].item() == pytest.approx(0.5)
    assert rgb[0, 2, 2].tolist() == pytest.approx([0.5 * (0.5 + 0.28209479), 0.25, 0.5 * (0.5 - 0.28209479) + 0.5])


def test_nearer_gaussian_hides_the_farther_one_whatever_their_order():
    red, blue = single(means=[0.0, 0.0, 0.5], sh=[[2.0, -2.0, -2.0]]), single(sh=[[-2.0, -2.0, 2.0]])
    for first, second in [(red, blue), (blue, red)]:
        both = Gaussians(*(torch.cat([getattr(first, f), getattr(second, f)]) for f in FIELDS))
        front, _, _ = rasterize(both, orbit(0.0, 0.0, 2.0, 49.1, 9, 9), 9, 9, torch.zeros(3))
        back, _, _ = rasterize(both, orbit(0.0, 180.0, 2.0, 49.1, 9, 9), 9, 9, torch.zeros(3))
        assert front[0, 4, 4].argmax() == 0
        assert back[0, 4, 4].argmax() == 2


def test_radii_bound_what_is_drawn():
    gaussians = single(log_scales=[-2.0, -4.0, -4.0])
    _, alpha, info = rasterize(gaussians, orbit(0.0, 0.0, 2.0, 49.1, 101, 101), 101, 101, torch.zeros(3))
    columns = torch.nonzero(alpha[0, :, :, 0].amax(dim=0))[:, 0]
    radius = info["radii"][0, 0].item()
    assert info["radii"].dtype == torch.int32
    assert radius - 2 <= 50 - columns.min().item() <= radius
    assert radius - 2 <= columns.max().item() - 50 <= radius


def test_behind_the_camera_nothing_is_drawn():
    gaussians = single(means=[0.0, 0.0, 3.0])
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    rgb, alpha, info = rasterize(gaussians, orbit(0.0, 0.0, 2.0, 49.1, 16, 16), 16, 16, torch.full((3,), 0.25))
    assert info["radii"].tolist() == [[0]]
    assert (rgb == 0.25).all()
    assert not alpha.any()
    rgb.sum().backward()
    assert not any(gradient(tensor).any() for tensor in gaussians.tensors().values())


def test_no_gaussians_leave_the_background():
    gaussians = scene(0, 4)
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    background = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    rgb, alpha, info = rasterize(gaussians, orbit(0.0, torch.tensor([0.0, 90.0]), 2.0, 49.1, 7, 5), 7, 5, background)
    assert rgb.shape == (2, 5, 7, 3)
    assert alpha.shape == (2, 5, 7, 1)
    assert info["means2d"].shape == (2, 0, 2)
    assert info["radii"].shape == (2, 0)
    assert torch.equal(rgb, background[:, None, None].expand(2, 5, 7, 3))
    rgb.sum().backward()
    assert gradient(gaussians.sh).shape == (0, 4, 3)


@pytest.mark.parametrize("log_scale", [-1e4, -60.0, -20.0, 5.0, 9.0, 20.0, 43.0, 60.0, 1e4])
def test_extreme_scales(log_scale):
    gaussians = scene(20)
    gaussians.log_scales[:10] = log_scale
    gaussians.log_scales[5:10, 1] = -3.0
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    rgb, alpha, _ = rasterize(gaussians, orbit(0.0, 0.0, 2.0, 49.1, 16, 16), 16, 16, torch.ones(3))
    (rgb.sum() + alpha.sum()).backward()
    assert torch.isfinite(rgb).all()
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    for tensor in gaussians.tensors().values():
        assert torch.isfinite(gradient(tensor)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38, -3e38])
@pytest.mark.parametrize("field", FIELDS)
def test_values_that_are_not_finite_do_not_spread(field, value):
    gaussians, cameras = scene(20, 16), orbit(0.0, 0.0, 2.0, 49.1, 16, 16)
    others = Gaussians(*(t[1:] for t in gaussians.tensors().values()))
    without, _, _ = rasterize(others, cameras, 16, 16, torch.ones(3))
    getattr(gaussians, field)[0] = value
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    rgb, alpha, info = rasterize(gaussians, cameras, 16, 16, torch.ones(3))
    (rgb.sum() + alpha.sum()).backward()
    assert torch.isfinite(alpha).all()
    if field == "sh" and abs(value) == 3e38:
        return  # finite, and as bright as float32 can be: its own colours may overflow
    assert torch.isfinite(rgb).all()
    for name, tensor in gaussians.tensors().items():
        assert torch.isfinite(gradient(tensor)).all(), name
    meaningful = [("log_scales", float("-inf")), ("logit_opacities", float("inf"))]  # a point; opaque
    if abs(value) != 3e38 and (field, value) not in meaningful:
        assert info["radii"][0, 0] == 0
        assert torch.equal(rgb, without)


def test_zero_quaternion_is_not_drawn():
    gaussians = single(quats=[0.0, 0.0, 0.0, 0.0])
    gaussians.quats.requires_grad_()
    rgb, _, info = rasterize(gaussians, orbit(0.0, 0.0, 2.0, 49.1, 8, 8), 8, 8, torch.ones(3))
    rgb.sum().backward()
    assert info["radii"].tolist() == [[0]]
    assert not gradient(gaussians.quats).any()


def test_result_does_not_depend_on_the_number_of_threads():
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            gaussians = scene(500, 9)
            for tensor in gaussians.tensors().values():
                tensor.requires_grad_()
            rgb, alpha, _ = rasterize(
                gaussians, orbit(0.0, torch.arange(3) * 50.0, 2.0, 49.1, 33, 41), 33, 41, torch.ones(3)
            )
            (rgb.square().sum() + alpha.sum()).backward()
            results.append([rgb.detach(), alpha.detach(), *(gradient(t) for t in gaussians.tensors().values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_many_python_threads_at_once():
    cameras = orbit(0.0, torch.arange(3) * 50.0, 2.0, 49.1, 32, 32)
    expected = [rasterize(scene(300, seed=i), cameras, 32, 32, torch.ones(3))[0] for i in range(8)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            rgb, _, _ = rasterize(scene(300, seed=i), cameras, 32, 32, torch.ones(3))
            if not torch.equal(rgb, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_large_batches_without_gradients_are_cut(monkeypatch):
    gaussians, background = scene(200), torch.rand(5, 3)
    cameras = orbit(0.0, torch.arange(5) * 50.0, 2.0, 49.1, 32, 32)
    rgb, alpha, info = rasterize(gaussians, cameras, 32, 32, background)
    monkeypatch.setattr(cpu, "MAX_BATCH", 250)
    with torch.no_grad():
        rgb2, alpha2, info2 = rasterize(gaussians, cameras, 32, 32, background)
    assert torch.equal(rgb, rgb2)
    assert torch.equal(alpha, alpha2)
    assert all(torch.equal(info[name], info2[name]) for name in ("means2d", "radii", "depths"))


def test_gaussians_that_cover_too_much_are_refused(monkeypatch):
    monkeypatch.setattr(cpu, "MAX_ENTRIES", 1000)
    gaussians = scene(300, scale=3.0, opacity=5.0)
    with pytest.raises(ValueError, match=r"gaussians are too large.*at most 1000"):
        rasterize(gaussians, orbit(0.0, 0.0, 2.0, 49.1, 64, 64), 64, 64, torch.ones(3))


def test_retain_grad_on_the_projected_centres():
    gaussians = scene(10)
    gaussians.means.requires_grad_()
    rgb, _, info = rasterize(gaussians, orbit(0.0, 0.0, 2.0, 49.1, 16, 16), 16, 16, torch.ones(3))
    info["means2d"].retain_grad()
    rgb.square().sum().backward()
    assert info["means2d"].grad.shape == (1, 10, 2)
    assert info["means2d"].grad.any()
    assert not info["means2d"].grad[info["radii"] == 0].any()


def test_views_that_are_not_contiguous():
    gaussians = scene(40, 4)
    strided = Gaussians(*(torch.stack([t, t], dim=1)[:, 0] for t in gaussians.tensors().values()))
    cameras = orbit(0.0, torch.arange(4) * 50.0, 2.0, 49.1, 16, 16)
    rgb, _, _ = rasterize(gaussians, cameras[::2], 16, 16, torch.ones(3))
    rgb2, _, _ = rasterize(strided, cameras[[0, 2]], 16, 16, torch.ones(2, 3))
    assert torch.equal(rgb, rgb2)


def test_warm_up():
    warm_up()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("means", torch.zeros(2, 2), "means has shape"),
        ("quats", torch.zeros(3, 4), "quats has shape"),
        ("logit_opacities", torch.zeros(2, 1), "logit_opacities has shape"),
        ("sh", torch.zeros(2, 5, 3), "sh has shape"),
        ("log_scales", torch.zeros(2, 3, dtype=torch.float64), "log_scales has type"),
    ],
)
def test_bad_gaussians_are_named(field, value, message):
    gaussians = scene(2)
    setattr(gaussians, field, value)
    with pytest.raises(ValueError, match=message):
        rasterize(gaussians, orbit(0.0, 0.0, 2.0, 49.1, 8, 8), 8, 8, torch.ones(3))


def test_bad_cameras_image_and_background_are_named():
    cameras = orbit(0.0, torch.tensor([0.0, 90.0]), 2.0, 49.1, 8, 8)
    with pytest.raises(ValueError, match="background has shape"):
        rasterize(scene(2), cameras, 8, 8, torch.ones(3, 3))
    with pytest.raises(ValueError, match="image size"):
        rasterize(scene(2), cameras, 8, 0, torch.ones(3))
    with pytest.raises(ValueError, match="cameras have"):
        rasterize(scene(2), Cameras(cameras.viewmats, cameras.Ks[:1]), 8, 8, torch.ones(3))
    with pytest.raises(ValueError, match="cameras have"):
        rasterize(scene(2), cameras[:0], 8, 8, torch.ones(3))
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        rasterize(scene(2).to("meta"), cameras, 8, 8, torch.ones(3))
