import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from generation.schema.options import Models
from generation.settings import CONFIGS
from generation.splats import cameras
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize
from generation.stages.self_check import (
    SelfCheck,
    TextClip,
    check,
    drop_outliers,
    fit_to_frame,
    render_views,
    run_gates,
    to_validators_frame,
    views,
)
from generation.stages.self_check.outliers import geometric_mean
from generation.weights import WeightsError, local_folder, lookup
from tests.support.standins import ball, colour_check


class TestGates:
    def test_a_good_splat_passes_all(self):
        gates = run_gates(ball())
        assert all(gate.passed and not gate.reason for gate in gates.values())

    @pytest.mark.parametrize(("count", "passed"), [(6999, False), (7000, True)])
    def test_number(self, count, passed):
        gate = run_gates(ball(count=count))["min_gaussians"]
        assert gate.passed is passed
        if not passed:
            assert "6999" in gate.reason
            assert "7000" in gate.reason

    @pytest.mark.parametrize(("hidden", "passed"), [(8000, True), (8001, False)])
    def test_opacity_share(self, hidden, passed):
        gaussians = ball(count=10_000)
        gaussians.logit_opacities[:hidden] = -9.2
        assert run_gates(gaussians)["opacity"].passed is passed

    @pytest.mark.parametrize(("opacity", "passed"), [(0.0011, True), (0.0009, False)])
    def test_what_counts_as_invisible(self, opacity, passed):
        gaussians = ball(count=10_000)
        gaussians.logit_opacities[:] = torch.tensor(opacity).logit()
        assert run_gates(gaussians)["opacity"].passed is passed

    def test_rotations_all_identity(self):
        gaussians = ball()
        gaussians.quats[:] = torch.tensor([1.0, 0, 0, 0])
        assert not run_gates(gaussians)["rotations"].passed
        gaussians.quats[:] = torch.tensor([-3.0, 0, 0, 0])  # the same rotation
        assert not run_gates(gaussians)["rotations"].passed
        gaussians.quats[5] = torch.tensor([1.0, 0.1, 0, 0])
        assert run_gates(gaussians)["rotations"].passed

    @pytest.mark.parametrize("name", ["means", "quats", "log_scales", "logit_opacities", "sh"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_not_finite(self, name, value):
        gaussians = ball()
        getattr(gaussians, name)[3] = value
        assert not run_gates(gaussians)["finite"].passed

    def test_bounding_box(self):
        assert not run_gates(ball(radius=0.01))["box_side"].passed
        far = ball()
        far.means += 3000
        assert not run_gates(far)["max_coordinate"].passed

    def test_nothing_at_all(self):
        empty = Gaussians(*(torch.zeros(shape) for shape in ((0, 3), (0, 4), (0, 3), (0,), (0, 1, 3))))
        assert not run_gates(empty)["min_gaussians"].passed

    def test_a_failed_gate_ends_the_check(self, monkeypatch):
        monkeypatch.setattr(check, "render_views", None)
        outcome = colour_check().check(ball(count=100), "a red ball")
        assert outcome.score is None
        assert outcome.failed_gate is not None
        assert outcome.failed_gate.startswith("min_gaussians: 100 Gaussians")
        assert outcome.parts == {"iqa": None, "alignment": 0.0, "ssim": 0.0, "lpips": None}


class TestFrame:
    def test_box_and_centre(self):
        moved = ball(radius=3.0)
        moved.means += torch.tensor([10.0, -4.0, 2.0])
        fitted = fit_to_frame(moved)
        side = (fitted.means.amax(0) - fitted.means.amin(0)).max()
        assert math.isclose(side, 1.5, rel_tol=1e-4)
        assert fitted.means.mean(0).abs().max() < 1e-4

    def test_views_do_not_depend_on_place_and_size(self):
        moved = ball(radius=2.0)
        moved.means += 5.0
        close = (render_views(fit_to_frame(ball())) - render_views(fit_to_frame(moved))).abs()
        assert close.mean() < 1e-3

    @pytest.mark.parametrize("fit", [True, False])
    def test_what_is_delivered_in_the_frame_is_checked_in_it(self, monkeypatch, fit):
        """A validator's one mean over all coordinates moves what is not centred."""
        seen = []

        def render(framed):
            seen.append(framed)
            return torch.rand(16, 3, 32, 32)

        monkeypatch.setattr(check, "render_views", render)
        moved = ball(radius=3.0)
        moved.means += torch.tensor([10.0, -4.0, 2.0])
        colour_check().check_all([(moved, "a red ball")], fit=fit)
        off_centre = float(seen[0].means.mean(0).abs().max())
        assert off_centre < 1e-3 if fit else off_centre > 0.5

    def test_a_splat_in_the_frame_stays_as_it_is(self):
        fitted = fit_to_frame(ball(radius=3.0))
        again = to_validators_frame(fitted)
        for name, value in fitted.tensors().items():
            assert torch.allclose(value, getattr(again, name), atol=1e-4), name

    def test_colours_under_black_are_delivered_as_they_were_optimised(self):
        """The optimisation's rasteriser draws them black, a validator's darker than that."""
        gaussians = ball("red")
        gaussians.logit_opacities[:] = -1.0
        gaussians.sh[::2] = -4.0
        fitted = fit_to_frame(gaussians)
        as_they_were = replace(fitted, sh=gaussians.sh)
        orbit = cameras.orbit(0.0, torch.zeros(1), 2.5, 49.1, 64, 64)
        optimised, delivered = (rasterize(each, orbit, 64, 64, torch.ones(3))[0] for each in (as_they_were, fitted))
        assert torch.allclose(optimised, delivered, atol=1e-6)
        assert (render_views(as_they_were) - render_views(fitted)).abs().max() > 0.1

    def test_elsewhere_the_validators_mistakes_are_made(self):
        """One mean over all coordinates, and opacities divided by the factor of size, up to 1."""
        moved = ball(radius=1.5)
        moved.means += torch.tensor([3.0, 0.0, 0.0])
        moved.logit_opacities[:10] = -1.0
        framed = to_validators_frame(moved)
        assert framed.means.mean(0).tolist() == pytest.approx([1.0, -0.5, -0.5], abs=0.02)
        faint = float(torch.tensor(-1.0).sigmoid())
        assert float(framed.logit_opacities[0].sigmoid()) == pytest.approx(faint * 2, abs=1e-2)
        assert (framed.logit_opacities[10:].sigmoid() == 1).all()
        assert render_views(framed).isfinite().all()

    def test_views_are_the_validators(self):
        gaussians = ball("blue")
        gaussians.log_scales[:] = math.log(0.01)  # thin, so that the ball ends where its points are
        views = render_views(fit_to_frame(gaussians))
        assert views.shape == (16, 3, 518, 518)
        assert torch.equal(views[:, :, 0, 0], torch.ones(16, 3))  # white background
        assert torch.equal(views[0], views[15])  # azimuth 0 and 360
        assert torch.equal((views * 255).round() / 255, views)  # 8 bits
        # A sphere of radius 0.75 at a distance of 2.5 and 49.1 degrees covers this share of the width.
        expected = math.tan(math.asin(0.75 / 2.5)) / math.tan(math.radians(49.1 / 2))
        covered = (views[0].amin(0) < 0.5).any(0).float().mean()
        assert abs(float(covered) - expected) < 0.05

    def test_sixteen_azimuths_of_a_round_and_pixels_that_are_cut_down(self, monkeypatch):
        asked, orbit = [], cameras.orbit

        def grey(gaussians, orbit, width, height, background):
            return (background - 0.5).expand(15, height, width, 3), None, None

        def noted(*how):
            asked.append(how)
            return orbit(*how)

        monkeypatch.setattr(cameras, "orbit", noted)
        monkeypatch.setattr(views, "rasterize", grey)
        assert (render_views(ball()) == 127 / 255).all()  # 127.5, not rounded
        ((elevation, azimuths, *others),) = asked
        assert (elevation, others) == (15.0, [2.5, 49.1, 518, 518])
        assert [*azimuths.tolist(), 360.0] == pytest.approx(torch.linspace(0, 360, 16).tolist())

    def test_azimuth_and_elevation(self):
        """A ball that is red in front, green on top: seen from the front and from 15 degrees above."""
        gaussians = ball("blue")
        gaussians.sh[gaussians.means[:, 2] > 0.25] = ball("red", count=1).sh
        gaussians.sh[gaussians.means[:, 1] > 0.45] = ball("green", count=1).sh
        views = render_views(fit_to_frame(gaussians))
        red, green, blue = (views[:, i] - views.sum(1) / 3 for i in range(3))
        assert (red[0] > 0.3).sum() > 20 * (red[8] > 0.3).sum()  # 8: azimuth 192
        assert ((green > 0.3).sum(dim=(1, 2)) > 50).all()
        below = render_views(fit_to_frame(replace(gaussians, means=gaussians.means * torch.tensor([1.0, -1.0, 1.0]))))
        assert ((below[:, 1] - below.sum(1) / 3 > 0.3).sum(dim=(1, 2)) < (green > 0.3).sum(dim=(1, 2))).all()
        assert blue[8].max() > 0.3


def the(value: float | None) -> float:
    """A score that was measured."""
    assert value is not None
    return value


class TestScore:
    def test_a_right_prompt_scores_above_a_wrong_one(self):
        checking = colour_check()
        right, wrong = checking.check(ball("red"), "a red ball"), checking.check(ball("red"), "a blue ball")
        assert the(right.score) > 0.9
        assert wrong.score == 0.0
        assert the(wrong.parts["alignment"]) < 0.3
        assert right.views is not None
        assert right.views.shape == (16, 3, 518, 518)

    def test_scale(self):
        images = torch.ones(16, 3, 64, 64)
        images[:, :, 16:48, 16:48] = torch.tensor([1.0, 1.0, 0.0])[:, None, None]  # yellow: cosine 0.7071 with red
        assert align(colour_check(), images, "a red square") == pytest.approx(math.sqrt(0.5), abs=1e-3)
        assert align(colour_check(cosine_scale=0.9), images, "red") == pytest.approx(0.7857, abs=1e-3)
        # Not limited to 1, as with the validators.
        assert align(colour_check(cosine_scale=0.35), images, "red") == pytest.approx(2.0203, abs=2e-3)

    def test_texts_and_pictures_have_floors_of_their_own(self):
        scored = colour_check()
        use = scored._text.use
        scored._text.use = type(use)(**{**vars(use), "min_alignment": 0.2, "min_image_alignment": 0.4})
        seen = [torch.rand(16, 3, 32, 32)] * 2
        checks = scored._measure(seen, ["red", Image.new("RGB", (8, 8), "red")])
        assert [each.least_alignment for each in checks] == [0.2, 0.4]

    def test_no_likeness_is_zero_not_an_error(self):
        images = torch.zeros(16, 3, 64, 64)
        images[:, 2] = 1.0
        assert align(colour_check(), images, "red") == pytest.approx(0, abs=1e-4)

    def test_image_prompts_compare_images(self):
        checking = colour_check(image_cosine_scale=0.9)
        picture = Image.new("RGBA", (50, 40))  # transparent: white
        picture.paste((255, 255, 0, 255), (10, 10, 40, 30))
        red, yellow = torch.ones(16, 3, 64, 64), torch.ones(16, 3, 64, 64)
        red[:, 1:, 20:40, 20:40] = 0
        yellow[:, 2:, 20:40, 20:40] = 0
        assert align(checking, yellow, picture) == pytest.approx(1 / 0.9, abs=1e-3)
        assert align(checking, red, picture) == pytest.approx(math.sqrt(0.5) / 0.9, abs=1e-2)

    def test_texts_and_pictures_together(self, monkeypatch):
        monkeypatch.setattr(views, "VIEW_SIZE", 130)
        checking = colour_check()
        picture = Image.new("RGB", (60, 60), "white")
        picture.paste((0, 0, 255), (15, 15, 45, 45))
        asked: list[tuple[Gaussians, str | Image.Image]] = [
            (ball("red"), "a red ball"),
            (ball("blue"), picture),
            (ball("red"), picture),
            (ball("blue"), "blue"),
        ]
        together = checking.check_all(asked)
        alone = [checking.check(*each) for each in asked]
        assert [round(the(each.score), 6) for each in together] == [round(the(each.score), 6) for each in alone]
        assert [the(each.score) > 0.9 for each in together] == [True, True, False, True]


def align(checking, images, prompt):
    with torch.no_grad():
        return checking._align([images], [prompt])[0]


class TestOutliers:
    def test_two_of_sixteen_go(self):
        values = torch.cat([torch.linspace(0.20, 0.26, 14), torch.tensor([0.02, 0.9])])
        kept = drop_outliers(values)
        assert len(kept) == 14
        assert kept.min() == pytest.approx(0.20)
        assert kept.max() == pytest.approx(0.26)

    def test_geometric_mean(self):
        assert geometric_mean(torch.tensor([1.0, 1.0, 0.5, 0.5])) == pytest.approx(math.sqrt(0.5))
        assert geometric_mean(torch.tensor([1.0, 0.0])) == 0.0

    def test_equal_values_all_stay(self):
        assert len(drop_outliers(torch.full((16,), 0.3))) == 16

    def test_a_step_of_float16_in_one_cosine_can_keep_others(self):
        """What the validators' rule (pytod 0.0.3) keeps of these, in steps of float16: docs/FIDELITY.md."""
        steps = torch.tensor([3, 33, -18, -10, -8, 2, 12, 18, 4, 4, -19, -22, -36, 6, 33, 3])
        nudged = steps.clone()
        nudged[8] += 1
        kept, more = (drop_outliers((1180 + each) / 4096) for each in (steps, nudged))
        assert sorted((kept * 4096 - 1180).tolist()) == sorted(x for x in steps.tolist() if x != 33)
        assert sorted((more * 4096 - 1180).tolist()) == sorted(nudged.tolist())
        assert (geometric_mean(more) - geometric_mean(kept)) / 0.35 == pytest.approx(3.26e-3, rel=0.01)

    def test_order_does_not_matter(self):
        values = torch.rand(16, generator=torch.Generator().manual_seed(1))
        assert torch.equal(drop_outliers(values).sort().values, drop_outliers(values.flip(0)).sort().values)


class TestLoading:
    def test_open_clip_folder_without_network(self, mini_models, no_network):
        choice = Models.load(mini_models).clip
        entry = lookup(choice)
        clip = TextClip.load(local_folder(entry), choice, entry.clip, "cpu")
        with torch.no_grad():
            views, (text,) = clip.embed(torch.rand(4, 3, 224, 224)), clip.encode(["a red cube"])
        assert views.norm(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-4)
        assert float(text.norm()) == pytest.approx(1.0, abs=1e-4)

    def test_clip_without_a_scale_is_refused(self, mini_models):
        choice = Models.load(mini_models).clip
        with pytest.raises(WeightsError, match="cosine_scale"):
            TextClip.load(local_folder(lookup(choice)), choice, None, "cpu")

    def test_the_model_that_is_broken_is_the_one_that_is_named(self, mini_models, tmp_path):
        """Not the first one of the stage, whose files are whole."""
        clip = Models.load(mini_models).clip
        models = Models.load(CONFIGS / "models_tiny.yaml").model_copy(update={"clip": clip})
        assert models.quality is not None
        entries = {"clip": lookup(clip), "quality": lookup(models.quality)}
        folders = {"clip": local_folder(entries["clip"]), "quality": tmp_path}
        with pytest.raises(WeightsError, match=r"^tiny-quality can not be loaded"):
            SelfCheck.load(folders, entries, models, "cpu")
        with pytest.raises(WeightsError, match=r"^mini-clip can not be loaded"):
            SelfCheck.load({**folders, "clip": tmp_path}, entries, models, "cpu")

    def test_a_folder_without_weights_is_refused(self, mini_models, tmp_path):
        choice = Models.load(mini_models).clip
        entry = lookup(choice)
        config = json.loads((local_folder(entry) / "open_clip_config.json").read_text())
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match="not a usable open_clip model"):
            TextClip.load(tmp_path, choice, entry.clip, "cpu")
