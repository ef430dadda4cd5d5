"""The generator around TRELLIS's networks; tests/contract/test_trellis.py has that these compute what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from generation.generators.base import NoSplat, Subject
from generation.generators.kinds import load_options
from generation.generators.trellis import generator as generator_module
from generation.generators.trellis.condition import Condition
from generation.generators.trellis.gaussian_decoder import RawGaussians
from generation.generators.trellis.generator import BORDER, Trellis, TrellisWork
from generation.generators.trellis.options import TrellisOptions
from generation.generators.trellis.splats import SHOWN_WITH, TRAINED_WITH, capped, sharpened, to_gaussians
from generation.generators.trellis.weights import Networks
from generation.schema.options import SettingsError
from generation.settings import CONFIGS
from generation.splats.cameras import Cameras, orbit
from generation.splats.frame import FOVY, RADIUS, VIEW_SIZE
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import rasterize
from tests.support import mini_trellis, reference_rasterizer

FAST: dict[str, Any] = {"structure_steps": 3, "slat_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_trellis.build(tmp_path_factory.mktemp("trellis"))


def trellis(folder: Path, **options: Any) -> Trellis:
    networks = Networks.load(folder / "trellis", "cpu", torch.float32)
    return Trellis(
        networks, Condition.load(folder / "dinov2", "cpu", torch.float32), TrellisOptions(**FAST | options), "cpu"
    )


def subject(seed: int) -> Subject:
    cutout = torch.rand(4, 56, 56, generator=torch.Generator().manual_seed(seed + 100))
    return Subject("", cutout, seed)


def finished(generator: Trellis, *works: TrellisWork) -> list[Gaussians]:
    while unfinished := [work for work in works if not work.done]:
        generator.tick(unfinished)
    return [work.gaussians() for work in works]


def apart(a: Gaussians, b: Gaussians) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


class TestMaking:
    def test_from_picture_to_gaussians(self, folder):
        generator = trellis(folder)
        work, fractions = generator.begin(subject(0)), []
        while not work.done:
            fractions.append(work.fraction)
            generator.tick([work])
        assert fractions == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
        assert work.fraction == 1
        gaussians = work.gaussians()
        gaussians.check()
        assert len(gaussians) >= 7000
        assert len(gaussians) % 32 == 0
        assert gaussians.means.abs().max() < 0.5 + 0.75 / 16

    def test_seed_and_picture_decide(self, folder):
        generator = trellis(folder)
        first, again, other = finished(generator, *(generator.begin(subject(seed)) for seed in (0, 0, 1)))
        assert apart(first, again) < 1e-5  # rounding: they are computed side by side
        assert len(first) != len(other)
        blank = generator.begin(Subject("", torch.zeros(4, 56, 56), 0))
        (of_another_picture,) = finished(generator, blank)
        same_seed = generator.begin(subject(0))
        finished(generator, same_seed)
        assert not torch.equal(same_seed.structure, blank.structure)
        assert len(of_another_picture) != len(first) or apart(of_another_picture, first) > 1e-2

    def test_those_beside_it_change_nothing(self, folder):
        """Whatever step they are at: in another flow, guided or not."""
        generator = trellis(folder, slat_steps=6)
        (alone,) = finished(generator, generator.begin(subject(0)))
        early, late = generator.begin(subject(1)), generator.begin(subject(2))
        generator.tick([early])
        work = generator.begin(subject(0))
        generator.tick([early, work])
        generator.tick([late, early, work])
        for _ in range(2):
            generator.tick([early, work, late])
        among, *_ = finished(generator, work, early, late)
        assert apart(among, alone) < 1e-4

    def test_noise_is_as_its_authors_draw_it(self, folder):
        """From the CPU's generator, the structures' first, then the latents' in the order of ``argwhere``."""
        generator = trellis(folder, structures=2)
        work = generator.begin(subject(7))
        torch.manual_seed(7)
        assert torch.equal(work.structure, torch.randn(2, 4, 4, 4, 4))
        cells = torch.argwhere(torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.9)
        work.features = torch.zeros(21, mini_trellis.WIDTH)
        generator._found(work, cells)
        assert work.latents is not None
        assert torch.equal(work.latents, torch.randn(len(cells), 4))

    def test_of_several_structures_the_one_of_the_fewest_voxels(self, folder):
        generator = trellis(folder, structures=3)
        work = generator.begin(subject(3))
        counts = []
        for _ in range(3):
            assert work.voxels is None
            generator.tick([work])
        with torch.no_grad():
            logits = generator._networks.structure_decoder(work.structure)
        counts = (logits > 0).flatten(1).sum(1).tolist()
        assert len(set(counts)) == 3
        assert work.voxels is not None
        assert work.voxels.fine.lengths == (min(counts),)
        (gaussians,) = finished(generator, work)
        assert len(gaussians) == 32 * min(counts)

    def test_at_most_so_many_gaussians(self, folder):
        generator = trellis(folder, max_gaussians=8000)
        (gaussians,) = finished(generator, generator.begin(subject(0)))
        assert len(gaussians) == 8000

    def test_it_rests_and_wakes(self, folder):
        generator = trellis(folder)
        (before,) = finished(generator, generator.begin(subject(0)))
        for _ in range(2):
            generator.offload()
            generator.onload()
        (after,) = finished(generator, generator.begin(subject(0)))
        assert apart(before, after) == 0

    def test_the_picture_is_as_large_as_dinov2s_and_the_object_1_in_1_2_of_it(self, folder):
        frame = trellis(folder).cutout
        assert frame == (56, BORDER)
        assert 1 / (1 - frame.border) == pytest.approx(1.2)


class SaysCuda(str):
    """A device's name that begins with "cuda" when it is asked."""

    def startswith(self, *prefix: Any) -> bool:
        return prefix == ("cuda",)


@pytest.mark.slow
def test_compiled_blocks_are_as_eager_ones_and_made_once_for_all_and_any_number(folder, monkeypatch):
    """Without a compiler behind it: that each part is one graph, and that new numbers of tokens need no new ones."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: plain(function, **options, backend="eager"))
    monkeypatch.setattr(generator_module, "_COMPILED", {})
    generator = trellis(folder)
    batches = ((0, 1), (2, 3, 4))
    expected = [finished(generator, *(generator.begin(subject(seed)) for seed in seeds)) for seeds in batches]
    for flow in (generator._networks.structure_flow, generator._networks.slat_flow):
        generator_module.compile_blocks(flow.blocks)
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(generator_module, "compile_blocks", lambda blocks: None)
    monkeypatch.setattr(
        generator._alone, "capture", lambda *inputs, constants: generator._alone(*inputs, constants=constants)
    )
    monkeypatch.setattr(generator, "_device", SaysCuda("cpu"))
    generator.warm_up(3, lambda text: None)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for splats, seeds in zip(expected, batches, strict=True):
        again = finished(generator, *(generator.begin(subject(seed)) for seed in seeds))
        assert max(map(apart, splats, again)) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


class TestNoSplat:
    def reason(self, folder: Path, **options: Any) -> str:
        generator = trellis(folder, **options)
        work = generator.begin(subject(0))
        with pytest.raises(NoSplat) as raised:
            finished(generator, work)
        return str(raised.value)

    def biased(self, tmp_path: Path, bias: float) -> Path:
        folder = mini_trellis.build(tmp_path)
        mini_trellis.change(folder, "ss_dec", out_layer__2__bias=torch.tensor([bias]))
        return folder

    def test_without_a_voxel(self, tmp_path):
        assert self.reason(self.biased(tmp_path, -100.0)) == "structure: it has no voxel"

    def test_with_values_that_are_not_finite(self, tmp_path):
        words = "structure: its values are not finite"
        assert self.reason(self.biased(tmp_path, float("nan")), structures=2) == words

    def test_with_too_many_voxels(self, tmp_path):
        folder = self.biased(tmp_path, 100.0)
        assert self.reason(folder, max_voxels=3000) == "structure: 4096 voxels are over the limit of 3000"

    def test_with_latents_that_are_not_finite(self, tmp_path):
        folder = mini_trellis.build(tmp_path)
        mini_trellis.change(folder, "slat_flow", out_layer__bias=torch.tensor([float("inf")] * 4))
        assert self.reason(folder).startswith("latents: ")

    def test_the_next_structure_is_taken_where_one_is_too_large(self, folder):
        generator = trellis(folder, structures=3)
        works = [generator.begin(subject(3)) for _ in range(2)]
        for _ in range(2):
            generator.tick(works)
        for work in works:  # the first structure of each as it is, the others full or not finite
            work.structure[1:] = torch.tensor([float("nan"), 1e4]).view(2, 1, 1, 1, 1)
        generator.tick(works)
        assert all(work.voxels is not None and not work.done for work in works)

    def test_others_go_on(self, folder, tmp_path):
        """One whose structure is not finite ends alone."""
        generator = trellis(folder)
        (alone,) = finished(generator, generator.begin(subject(1)))
        bad, good = generator.begin(subject(0)), generator.begin(subject(1))
        bad.structure[:] = float("nan")
        finished_works = [bad, good]
        while unfinished := [work for work in finished_works if not work.done]:
            generator.tick(unfinished)
        with pytest.raises(NoSplat, match="not finite"):
            bad.gaussians()
        assert apart(good.gaussians(), alone) < 1e-4


class TestSplats:
    def test_orientation_by_a_render(self):
        """A known object in TRELLIS's frame: z up, and its front where its authors' GLB export has it, towards -y.

        Red on top, blue in front, green on the right hand of who looks at the front, and a tall black bar in it all.
        """
        places = torch.tensor([[0, 0, 0.4], [0, -0.4, 0], [0.4, 0, 0], [0, 0, 0]])
        colours = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]])
        scales = torch.tensor([[0.05] * 3] * 3 + [[0.3, 0.03, 0.03]])
        quarter = torch.tensor([0.5**0.5, 0, -(0.5**0.5), 0])  # around y: x to z
        quats = torch.stack([torch.tensor([1.0, 0, 0, 0])] * 3 + [quarter])
        raw = RawGaussians(places, (colours - 0.5) / SH_C0, scales, quats, torch.full((4,), 6.0))
        gaussians = to_gaussians(raw)
        rgb, _, _ = rasterize(
            gaussians, orbit(0.0, torch.tensor([0.0, 90.0]), 2.5, 49.1, 100, 100), 100, 100, torch.ones(3)
        )
        front, right = rgb

        def at(picture: torch.Tensor, x: int, y: int) -> list[int]:
            return picture[y, x].round().int().tolist()

        assert at(front, 50, 50) == [0, 0, 1]  # blue is nearest
        assert at(front, 50, 32) == [1, 0, 0]  # red above
        assert at(front, 68, 50) == [0, 1, 0]  # green on the right
        assert at(right, 50, 50) == [0, 1, 0]  # from there, green is nearest
        assert at(right, 32, 50) == [0, 0, 1]  # and blue on the left
        assert at(front, 50, 60) == [0, 0, 0]
        assert at(front, 60, 60) == [1, 1, 1]

    def test_what_validators_see_is_closer_to_what_the_training_saw(self, monkeypatch):
        """A known patch in a view of 518 pixels, against the training's renderer written out: 0.1 pixels^2, and
        opacities that fall as it spreads."""
        g = torch.Generator().manual_seed(0)
        places = (torch.rand(700, 3, generator=g) - 0.5) * torch.tensor([0.08, 0.08, 0.01])
        places = torch.cat([places, torch.tensor([[-0.75, 0.0, 0.0], [0.75, 0.0, 0.0]])])  # it is 1.5 wide
        scales = torch.tensor([0.005, 0.005, 0.0015]) * (0.4 * torch.randn(len(places), 3, generator=g)).exp()
        quats = torch.randn(len(places), 4, generator=g) * 0.2 + torch.tensor([1.0, 0, 0, 0])
        colours = 0.5 + 0.4 * torch.sin(150 * places)
        sh = ((colours - 0.5) / SH_C0)[:, None]
        splat = Gaussians(places, quats, scales.log(), torch.full((len(places),), 3.0), sh)
        whole = orbit(15.0, torch.tensor([0.0, 40.0]), RADIUS, FOVY, VIEW_SIZE, VIEW_SIZE)
        window = replace(whole, Ks=whole.Ks - torch.tensor([[0, 0, 1.0], [0, 0, 1], [0, 0, 0]]) * (VIEW_SIZE / 2 - 16))

        def render(each: Gaussians, blur: float, compensated: bool) -> torch.Tensor:
            monkeypatch.setattr(reference_rasterizer, "BLUR", blur)
            views = []
            for number in range(2):
                fields = {name: value.double() for name, value in each.tensors().items()}
                if compensated:
                    covariance = projected(each, window, number)
                    kept = (covariance.det() / (covariance + blur * torch.eye(2)).det()).sqrt()
                    fields["logit_opacities"] = (fields["logit_opacities"].sigmoid() * kept).logit()
                rgb, *_ = reference_rasterizer.render(fields, window[[number]], 32, 32, torch.ones(1, 3))
                views.append(rgb)
            return torch.cat(views)

        truth = render(splat, TRAINED_WITH, compensated=True)
        plain, sharp = (render(each, SHOWN_WITH, compensated=False) for each in (splat, sharpened(splat)))
        before, after = (float((views - truth).square().mean().sqrt()) for views in (plain, sharp))
        assert before > 0.01
        assert after < before / 2.5

    def test_those_that_show_least_are_left_out(self):
        scales = torch.tensor([[1.0, 1.0, 1e-4], [0.5, 0.5, 0.5], [1.0, 0.01, 0.01], [1.0, 1.0, 1e-4]])
        opacities = torch.tensor([0.5, 0.9, 0.9, 0.1])
        means = torch.arange(4.0)[:, None].expand(4, 3)
        gaussians = Gaussians(means, torch.ones(4, 4), scales.log(), opacities.logit(), torch.ones(4, 1, 3))
        assert capped(gaussians, 2).means[:, 0].tolist() == [0, 1]  # 0.5, 0.225, 0.009, 0.1
        assert capped(gaussians, 3).means[:, 0].tolist() == [0, 1, 3]
        assert capped(gaussians, 4) is gaussians


def projected(gaussians: Gaussians, cameras: Cameras, number: int) -> torch.Tensor:
    """(N, 2, 2) what Gaussians cover of a view, in pixels^2."""
    rotation, shift, focal = cameras.viewmats[number, :3, :3], cameras.viewmats[number, :3, 3], cameras.Ks[number, 0, 0]
    x, y, z = (gaussians.means @ rotation.T + shift).double().unbind(1)
    zero = torch.zeros_like(z)
    rows = [torch.stack(row, 1) for row in ((1 / z, zero, -x / z**2), (zero, 1 / z, -y / z**2))]
    spread = gaussians.rotations() * gaussians.log_scales.exp()[:, None]
    half = focal.double() * torch.stack(rows, 1) @ (rotation @ spread).double()
    return half @ half.transpose(1, 2)


class TestOptions:
    @pytest.mark.parametrize(
        ("name", "steps", "guidance"), [("trellis", (25, 25), (5.0, 5.0)), ("trellis_fast", (12, 12), (7.5, 3.0))]
    )
    def test_shipped_configs(self, name, steps, guidance):
        options = load_options(CONFIGS / f"{name}.yaml")
        assert isinstance(options, TrellisOptions)
        assert options.draws
        assert (options.structure_steps, options.slat_steps) == steps
        assert (options.structure_guidance, options.slat_guidance) == guidance
        assert (options.structure_interval, options.slat_interval) == ((0.5, 1.0), (0.5, 1.0))
        assert (options.structure_rescale, options.slat_rescale) == (3.0, 3.0)
        assert (options.structures, options.max_voxels, options.max_gaussians) == (1, 32_768, 800_000)
        assert options.picture_prompt("a cat").startswith("a cat, ")
        assert set(options.checkpoints) == {"trellis", "dinov2"}
        assert options.capped(9000).max_gaussians == 9000

    def test_defaults_are_the_pipelines(self):
        assert TrellisOptions() == load_options(CONFIGS / "trellis.yaml")

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("structures: 9", "structures.* 8"),
            ("slat_interval: [0.6, 0.5]", "slat_interval 0.6 to 0.5: must begin with its lower end"),
            ("slat_guidance: -1", "slat_guidance"),
            ("steps: 3", "steps"),
            ("max_voxels: 100", "max_voxels.*218"),
        ],
    )
    def test_what_can_not_be_is_named(self, tmp_path, line, words):
        path = tmp_path / "wrong.yaml"
        path.write_text(f"generator: trellis\n{line}\n")
        with pytest.raises(SettingsError, match=f"wrong.yaml.*{words}"):
            load_options(path)
