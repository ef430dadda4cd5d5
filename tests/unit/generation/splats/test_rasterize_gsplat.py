"""The GPU wrapper without a GPU: what it asks gsplat for, and what it says when gsplat is missing.

With a GPU and gsplat, the last test compares both rasterisers in values and gradients.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from generation.splats.cameras import Cameras, orbit
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import gsplat as wrapper
from generation.splats.rasterize import rasterize, rasterize_scenes
from scripts.tools import fidelity_gpu


def scene(n: int, coefficients: int) -> Gaussians:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    return Gaussians(0.4 * normal(n, 3), normal(n, 4), normal(n, 3) - 3.0, normal(n), 0.4 * normal(n, coefficients, 3))


def test_arguments_and_results(monkeypatch):
    asked = {}
    means2d = torch.zeros(2, 6, 2)

    def rasterization(**arguments):
        asked.update(arguments)
        radii = torch.tensor([[[3, 5]] * 6, [[0, 0]] * 6], dtype=torch.int32)
        meta = {"means2d": means2d, "radii": radii, "depths": torch.ones(2, 6), "conics": None}
        return torch.ones(2, 8, 9, 3), torch.ones(2, 8, 9, 1), meta

    monkeypatch.setitem(sys.modules, "gsplat", types.SimpleNamespace(rasterization=rasterization))
    monkeypatch.setattr(wrapper.gsplat_build, "load", lambda: None)
    gaussians, cameras = scene(6, 9), orbit(0.0, torch.tensor([0.0, 90.0]), 2.0, 49.1, 9, 8)
    rgb, alpha, info = wrapper.rasterize(gaussians, cameras, 9, 8, torch.ones(2, 3))
    assert rgb.shape == (2, 8, 9, 3)
    assert alpha.shape == (2, 8, 9, 1)
    assert info["means2d"] is means2d  # the very tensor of the graph
    assert info["radii"].tolist() == [[5] * 6, [0] * 6]
    assert (asked["width"], asked["height"], asked["sh_degree"], asked["packed"]) == (9, 8, 2, False)
    assert torch.equal(asked["scales"], gaussians.log_scales.exp())
    assert torch.equal(asked["opacities"], gaussians.logit_opacities.sigmoid())
    assert asked["viewmats"].shape == (2, 4, 4)
    assert asked["backgrounds"].shape == (2, 3)
    assert (asked["near_plane"], asked["eps2d"], asked["rasterize_mode"]) == (0.01, 0.3, "classic")
    assert asked["colors"] is gaussians.sh

    plain = scene(6, 1)
    wrapper.rasterize(plain, cameras, 9, 8, torch.ones(2, 3))
    assert asked["sh_degree"] is None
    assert asked["colors"].shape == (6, 3)
    assert torch.equal(asked["colors"], (0.5 + SH_C0 * plain.sh[:, 0]).clamp_min(0))


def test_missing_gsplat_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(ImportError, match=r"scripts/install\.sh gpu"):
        wrapper.rasterize(scene(1, 1), orbit(0.0, 0.0, 2.0, 49.1, 8, 8), 8, 8, torch.ones(1, 3))


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("gsplat") is None, reason="needs a CUDA GPU and gsplat"
)
@pytest.mark.parametrize("coefficients", [1, 4, 9, 16])
def test_gpu_and_cpu_agree(coefficients):
    gpu, cpu = fidelity_gpu.run("cuda", coefficients), fidelity_gpu.run("cpu", coefficients)
    for name, value in cpu.items():
        difference = (gpu[name] - value).abs()
        if name in ("colours", "alphas"):
            assert (difference > fidelity_gpu.LIMIT).float().mean() < 1e-3
            assert difference.max() < 0.02
        else:
            assert difference.norm() <= 0.01 * value.norm()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not torch.cuda.is_available() or importlib.util.find_spec("gsplat") is None,
                    reason="needs a CUDA GPU and gsplat",
                ),
            ],
        ),
    ],
)
@pytest.mark.parametrize("coefficients", [1, 4])
def test_scenes_look_the_same_together_and_alone(device, coefficients):
    """Also in what they are told to become, and whatever sizes they have."""
    scenes, results = [], {}
    for i, n in enumerate((300, 120, 500)):
        gaussians = scene(n, coefficients).to(device)
        for tensor in gaussians.tensors().values():
            tensor.requires_grad_()
        cameras = orbit(10.0 * i, torch.tensor([0.0, 90.0]), 2.0, 49.1, 24, 24)
        scenes.append((gaussians, cameras, torch.tensor([0.1, 0.5, 0.2 * i])))
    weights = torch.randn(2, 24, 24, 4, generator=torch.Generator().manual_seed(1)).to(device)

    def pulled(drawn, of):
        for rgb, alpha, info in drawn:
            info["means2d"].retain_grad()
            (torch.cat([rgb, alpha], -1) * weights).sum().backward(retain_graph=True)
        for (gaussians, _, _), (rgb, alpha, info) in zip(of, drawn, strict=True):
            own = info.get("own", ...)
            yield rgb, alpha, info["radii"], info["means2d"].grad[own], *(t.grad for t in gaussians.tensors().values())
            for tensor in gaussians.tensors().values():
                tensor.grad = None

    results["together"] = list(pulled(rasterize_scenes(scenes, 24, 24), scenes))
    results["alone"] = list(pulled([rasterize(*s[:2], 24, 24, s[2]) for s in scenes], scenes))
    for together, alone in zip(results["together"], results["alone"], strict=True):
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.shape == theirs.shape
            assert (ours.float() - theirs.float()).norm() <= 1e-3 * theirs.float().norm()


def test_smaller_scenes_are_filled_up_with_what_is_not_drawn(monkeypatch):
    """Our CPU kernel stands in for gsplat's, one scene after the other."""

    def rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height, backgrounds, **_):
        fields = (means, quats, scales.log(), opacities.logit(), ((colors - 0.5) / SH_C0)[:, :, None])
        drawn = []
        for i in range(len(means)):
            cameras = Cameras(viewmats[i], Ks[i])
            drawn.append(rasterize(Gaussians(*(field[i] for field in fields)), cameras, width, height, backgrounds[i]))
        infos = [info for _, _, info in drawn]
        meta = {name: torch.stack([info[name] for info in infos]) for name in ("means2d", "depths")}
        meta["radii"] = torch.stack([info["radii"] for info in infos])[..., None].expand(-1, -1, -1, 2)
        return torch.stack([rgb for rgb, _, _ in drawn]), torch.stack([alpha for _, alpha, _ in drawn]), meta

    monkeypatch.setitem(sys.modules, "gsplat", types.SimpleNamespace(rasterization=rasterization))
    monkeypatch.setattr(wrapper.gsplat_build, "load", lambda: None)
    scenes = []
    for i, n in enumerate((300, 120, 500)):
        gaussians = scene(n, 1)
        gaussians.sh.clamp_(-1.0, 1.0)  # colours above 0, whose way back is the harmonics themselves
        for tensor in gaussians.tensors().values():
            tensor.requires_grad_()
        cameras = orbit(10.0 * i, torch.tensor([0.0, 90.0]), 2.0, 49.1, 24, 24)
        scenes.append((gaussians, cameras, torch.tensor([0.1, 0.5, 0.2 * i]).expand(2, 3)))
    together = wrapper.rasterize_scenes(scenes, 24, 24)
    for (gaussians, cameras, background), (rgb, alpha, info) in zip(scenes, together, strict=True):
        alone = rasterize(gaussians, cameras, 24, 24, background)
        fields = list(gaussians.tensors().values())
        ours = torch.autograd.grad(rgb.square().sum() + alpha.sum(), fields, retain_graph=True)
        theirs = torch.autograd.grad(alone[0].square().sum() + alone[1].sum(), fields)
        assert torch.allclose(rgb, alone[0], atol=1e-5)
        assert torch.allclose(alpha, alone[1], atol=1e-5)
        assert torch.equal(info["radii"], alone[2]["radii"])
        assert torch.allclose(info["means2d"][info["own"]], alone[2]["means2d"], atol=1e-4)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm()


def test_scenes_of_different_kinds_are_not_rendered_together():
    cameras = orbit(0.0, torch.tensor([0.0, 90.0]), 2.0, 49.1, 8, 8)
    with pytest.raises(ValueError, match="as many"):
        rasterize_scenes([(scene(3, 1), cameras, torch.ones(3)), (scene(3, 4), cameras, torch.ones(3))], 8, 8)


class TestPairs:
    """Of Gaussians and tiles, which gsplat numbers with 32 bits (TORCH_CHECKs of ROCm's gsplat say so)."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list[int]:
        calls = []

        def drawn(fields, viewmats, Ks, width, height, background):
            views, n = len(viewmats), len(fields["means"])
            calls.append(views)
            info = {"means2d": torch.zeros(views, n, 2), "radii": torch.ones(views, n), "depths": torch.ones(views, n)}
            return background[:, None, None].expand(views, 2, 2, 3), torch.ones(views, 2, 2, 1), info

        monkeypatch.setattr(wrapper, "_rasterize", drawn)
        return calls

    @staticmethod
    def huge(n: int) -> Gaussians:
        place, colour = torch.zeros(n, 3), torch.zeros(n, 1, 3)
        return Gaussians(place, torch.ones(n, 4), torch.full((n, 3), 5.0), torch.zeros(n), colour)

    def draw(self, gaussians: Gaussians) -> tuple[torch.Tensor, torch.Tensor, dict]:
        cameras = orbit(15.0, torch.arange(15) * 24.0, 2.5, 49.1, 518, 518)
        return wrapper.rasterize(gaussians, cameras, 518, 518, torch.arange(45.0).view(15, 3))

    def test_what_is_too_much_for_one_call_is_drawn_in_several(self, calls):
        with torch.no_grad():
            rgb, alpha, info = self.draw(self.huge(34_000))  # each on 65 x 65 tiles of 15 views
        assert calls == [7, 8]
        assert torch.equal(rgb[:, 0, 0], torch.arange(45.0).view(15, 3))
        assert (len(alpha), *(len(each) for each in info.values())) == (15,) * 4

    def test_what_is_too_much_for_one_view_is_refused(self, calls):
        with torch.no_grad(), pytest.raises(ValueError, match="gaussians are too large"):
            self.draw(self.huge(510_000))
        assert not calls

    def test_what_fits_is_drawn_at_once(self, calls):
        with torch.no_grad():
            usual = scene(400_000, 1)
            usual.log_scales.sub_(2.0)  # most are under a hundredth of the scene
            self.draw(usual)
            self.draw(self.huge(33_000))
        assert calls == [15, 15]

    @pytest.mark.parametrize("size", [-6.0, -3.0, 0.0])
    def test_they_are_not_fewer_than_there_are(self, size):
        gaussians = scene(500, 1)
        gaussians.log_scales.copy_(gaussians.log_scales + 3.0 + size)
        cameras = orbit(15.0, torch.arange(4) * 90.0, 2.5, 49.1, 130, 100)
        with torch.no_grad():
            info = rasterize(gaussians, cameras, 130, 100, torch.ones(3))[2]
        radius, centre = info["radii"][..., None], info["means2d"]
        tiles = torch.tensor([17, 13])
        low = ((centre - radius) / wrapper.TILE).floor().clamp(min=0).minimum(tiles)
        high = ((centre + radius) / wrapper.TILE).ceil().clamp(min=0).minimum(tiles)
        there = ((high - low).prod(-1) * (info["radii"] > 0)).sum(1)
        for counted, true in zip(wrapper._pairs(gaussians, cameras, 130, 100), there.tolist(), strict=True):
            assert true <= counted <= 8 * true
