"""The validators' whole score: against their own answers, and when parts of it are missing."""

import io
import json
import math
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Model

from generation.schema.options import ModelChoice
from generation.schema.score import final_score, formula, in_words, shares
from generation.stages.self_check import ImageClip, Lpips, Quality, QualityNet, neighbour_ssim
from generation.stages.self_check.quality import DINOV2_SMALL, WEIGHTS
from generation.stages.self_check.views import grid_preview, preview
from generation.weights import WeightsError
from generation.weights.registry import REGISTRY, ClipUse
from scripts.tools.scored_scenes import (
    GOLDEN,
    NAMES,
    SIZE,
    Models,
    alexnet_file,
    measure,
    ours,
    quality_config,
    quality_file,
    scenes,
)
from tests.support.standins import ball, colour_check


def our_lpips() -> Lpips:
    """Of the self-check with the golden weights."""
    lpips = ours()._lpips
    assert lpips is not None
    return lpips


ALL = {"iqa": 0.7, "alignment": 0.8, "ssim": 0.9, "lpips": 0.75}


@pytest.mark.parametrize("kind", ["text", "picture"])
@pytest.mark.parametrize("name", NAMES)
def test_the_public_validators_answers(kind, name):
    theirs, found = json.loads(GOLDEN.read_text())[kind][name], measure(name, kind)
    assert found == {part: pytest.approx(value, abs=1e-4) for part, value in theirs.items()}


class TestFinalScore:
    def test_all_parts(self):
        ssim = 1 / (1 + math.exp(-35 * (0.9 - 0.83)))
        lpips = 0.75 / (1 + math.exp(-30 * (0.75 - 0.7)))
        expected = 0.75 * 0.7 + 0.2 * 0.8 + 0.025 * ssim + 0.025 * lpips
        assert final_score(ALL) == pytest.approx(expected, abs=1e-9)

    def test_what_is_missing_leaves_the_sum(self):
        assert final_score({**ALL, "iqa": None, "lpips": None}) == 0.8
        assert final_score({**ALL, "iqa": None}) == 0.8
        ssim = 1 / (1 + math.exp(-35 * (0.9 - 0.83)))
        expected = (0.75 * 0.7 + 0.2 * 0.8 + 0.025 * ssim) / 0.975
        assert final_score({**ALL, "lpips": None}) == pytest.approx(expected, abs=1e-9)
        assert sum(shares(["iqa", "alignment", "ssim"]).values()) == pytest.approx(1)

    def test_low_alignment_is_nothing(self):
        assert final_score({**ALL, "alignment": 0.299}) == 0
        assert final_score({**ALL, "alignment": 0.3}) > 0
        assert final_score({**ALL, "alignment": 0.59}, min_alignment=0.6) == 0

    def test_nothing_is_limited_from_above_and_what_is_broken_is_nothing(self):
        assert final_score({"alignment": 1.3, "iqa": None, "ssim": None, "lpips": None}) == 1.3
        assert final_score({**ALL, "alignment": math.nan}) == 0
        assert final_score({**ALL, "ssim": math.inf}) == 0

    def test_in_words(self):
        assert formula(ALL) == "0.75 quality + 0.2 alignment + 0.025 SSIM + 0.025 LPIPS"
        assert formula(["ssim", "alignment"]) == "alignment alone"
        assert in_words(0.71, ALL) == "0.71 (quality 0.70, alignment 0.80, SSIM 0.90, LPIPS 0.75)"
        assert in_words(0.8, {**ALL, "iqa": None}) == "0.80 (alignment 0.80)"


class TestWhole:
    @pytest.mark.slow
    def test_of_a_splat(self):
        parts: dict[str, Any] = {"quality": ours()._quality, "lpips": ours()._lpips}
        check = colour_check(**parts).check(ball("red"), "a red ball")
        assert all(value is not None and 0 < value <= 1.001 for value in check.parts.values())
        assert len(check.parts) == 4
        assert check.score == final_score(check.parts)
        assert colour_check(**parts).check(ball("red"), "a blue ball").score == 0

    def test_what_has_no_weights_is_none(self):
        check = colour_check().check(ball("red"), "a red ball")
        assert check.parts["iqa"] is check.parts["lpips"] is None
        assert check.parts["ssim"] is not None
        assert check.parts["ssim"] > 0.9
        assert check.score == check.parts["alignment"]

    @pytest.mark.slow
    def test_several_together_as_one_by_one(self):
        checking = colour_check(quality=ours()._quality, lpips=ours()._lpips)
        asked = [(ball(colour), f"a {colour} ball") for colour in ("red", "blue")]
        together = checking.check_all(asked)
        alone = [checking.check(*each) for each in asked]
        assert [each.score for each in together] == pytest.approx([each.score for each in alone], abs=1e-5)


class TestSimilarity:
    def test_ssim_is_torchmetrics(self):
        views = scenes()["a rough one"]
        metric = StructuralSimilarityIndexMeasure(data_range=1.0).double()
        each = views.double()[:, None]
        theirs = [float(metric(each[i], each[(i + 1) % 16])) for i in range(16)]
        assert neighbour_ssim(views.double()).tolist() == pytest.approx(theirs, abs=1e-6)
        assert neighbour_ssim(views).tolist() == pytest.approx(theirs, abs=1e-5)

    def test_lpips_is_torchmetrics(self, monkeypatch):
        views = scenes()["a calm one"]
        monkeypatch.setattr("torchvision.models.alexnet", lambda **_: Models.alexnet())
        metric = LearnedPerceptualImagePatchSimilarity(normalize=True)
        small = torch.nn.functional.interpolate(views, size=(256, 256), mode="bicubic").clamp(0, 1)
        theirs = [float(metric(small[i : i + 1], small[(i + 1) % 16][None])) for i in range(16)]
        found = our_lpips().distances(views).tolist()
        assert found == pytest.approx(theirs, abs=1e-5)
        assert found[15] == 0.0  # the last view is the first

    def test_equal_views_are_at_no_distance_whatever_kernels_make_of_them(self):
        """A kept distance of 0 makes the term 1; of 1e-6 it does not."""

        class Noisy(torch.nn.Module):
            def forward(self, views: torch.Tensor, after: torch.Tensor, normalize: bool) -> torch.Tensor:
                return torch.full((len(views),), 1e-6)

        views = torch.rand(4, 3, 300, 300, generator=torch.Generator().manual_seed(0))
        views[3] = views[0]  # as the first and the last one are
        net: Any = Noisy()
        assert Lpips(net, "cpu").distances(views).tolist() == pytest.approx(
            [1e-6, 1e-6, 1e-6, 0.0], rel=1e-3, abs=1e-12
        )

    def test_alexnet_comes_from_a_file_and_never_from_the_network(self, tmp_path, no_network, monkeypatch):
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("torchvision wanted to fetch a checkpoint")

        monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse, raising=False)
        path = tmp_path / "alexnet.pth"
        torch.save({**alexnet_file(), "classifier.6.bias": torch.zeros(10)}, path)
        before = torch.random.get_rng_state()
        found = Lpips.load(path, "cpu").distances(scenes()["a calm one"])
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(found, our_lpips().distances(scenes()["a calm one"]))

    @pytest.mark.parametrize("damage", ["absent", "cut", "pickle", "lacks", "shape"])
    def test_a_damaged_file_is_refused(self, tmp_path, damage):
        path, state = tmp_path / "alexnet.pth", alexnet_file()
        if damage == "lacks":
            del state["features.3.bias"]
        if damage == "shape":
            state["features.3.bias"] = torch.zeros(3)
        if damage != "absent":
            torch.save({**state, "code": print} if damage == "pickle" else state, path)
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(WeightsError, match=r"alexnet\.pth: not a usable AlexNet"):
            Lpips.load(path, "cpu")


class TestQuality:
    def write(self, folder, state):
        save_file(state, folder / WEIGHTS)
        quality_config().save_pretrained(folder)
        return folder

    def test_both_names_of_a_backbone_are_the_same_net(self, tmp_path):
        net = QualityNet.load(self.write(tmp_path, quality_file()))
        renamed = {f"backbone.{name}": value for name, value in net.backbone.state_dict().items()}
        head = {f"score_head.{name}": value for name, value in net.score_head.state_dict().items()}
        again = QualityNet.load(self.write(tmp_path, {**renamed, **head}))
        images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(net(images), again(images))
        assert not net.training
        assert not any(parameter.requires_grad for parameter in net.parameters())

    def test_the_head_looks_at_the_class_token(self, tmp_path):
        net = QualityNet.load(self.write(tmp_path, quality_file()))
        images = scenes()["a calm one"][:2]
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        token = net.backbone((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 0]
        logits = token @ quality_file()["score_head.weight"][0] + quality_file()["score_head.bias"]
        assert Quality(net, "cpu").score(images).tolist() == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)

    def test_views_of_another_size_are_brought_to_the_nets(self, tmp_path):
        quality = Quality(QualityNet.load(self.write(tmp_path, quality_file())), "cpu")
        large = torch.full((1, 3, 518, 518), 0.4)
        assert float(quality.score(large)) == pytest.approx(float(quality.score(large[..., :SIZE, :SIZE])), abs=1e-5)

    @pytest.mark.parametrize("damage", ["absent", "cut", "lacks", "shape", "unknown", "head"])
    def test_weights_that_are_not_the_configs_are_refused(self, tmp_path, damage):
        state = quality_file()
        if damage == "lacks":
            del state["backbone.layernorm.bias"]
        if damage == "shape":
            state["backbone.layernorm.bias"] = torch.zeros(3)
        if damage == "unknown":
            state["backbone.more"] = torch.zeros(3)
        if damage == "head":
            del state["score_head.bias"]
        self.write(tmp_path, state)
        if damage == "absent":
            (tmp_path / WEIGHTS).unlink()
        if damage == "cut":
            (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:500])
        with pytest.raises(WeightsError, match=r"quality model|DINOv2"):
            QualityNet.load(tmp_path)

    def test_the_public_config_is_dinov2_smalls(self):
        with torch.device("meta"):
            model = Dinov2Model(quality_config().__class__(**DINOV2_SMALL))
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        assert shapes["embeddings.position_embeddings"] == (1, 37 * 37 + 1, 384)
        assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576


class TestPictures:
    CONFIG = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=20,
    )  # fmt: skip
    CHOICE = ModelChoice(model="/nowhere")

    def write(self, folder, change=lambda state: None):
        torch.manual_seed(0)
        tower = CLIPVisionModelWithProjection(self.CONFIG).eval()
        tower.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
        state |= {"text_adapter.adaptor.0.weight": torch.zeros(2), "logit_scale": torch.zeros(1)}
        state["vision_model.embeddings.position_ids"] = torch.arange(5)
        change(state)
        save_file(state, folder / "model.safetensors")
        config = {"vision_config": {**self.CONFIG.to_dict(), "projection_dim": 8}, "projection_dim": 20}
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.CLIPModel"}}))
        return tower

    def test_the_tower_is_read_out_of_the_whole_model(self, tmp_path, no_network):
        tower = self.write(tmp_path)
        clip = ImageClip.load(tmp_path, self.CHOICE, ClipUse(1.0), "cpu")
        images = torch.rand(3, 3, 28, 28)
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            expected = torch.nn.functional.normalize(tower(pixels).image_embeds, dim=1)
            assert torch.allclose(clip.embed(images), expected, atol=1e-5)

    def test_three_times_the_mean_and_the_deviation(self):
        for name, size in (("clip-convnext-large-d", 224), ("llm2clip-l-14-336", 336)):
            use = REGISTRY[name].clip
            assert use is not None
            assert use.image_size == size
            assert use.std == pytest.approx([0.80588862, 0.78390774, 0.82733133])
            assert use.mean == pytest.approx([1.44436398, 1.3734825, 1.22463231])

    @pytest.mark.parametrize("damage", ["lacks", "shape", "config", "cut"])
    def test_what_is_not_exactly_the_tower_is_refused(self, tmp_path, damage):
        def change(state):
            if damage == "lacks":
                del state["visual_projection.weight"]
            if damage == "shape":
                state["vision_model.post_layernorm.bias"] = torch.zeros(3)

        self.write(tmp_path, change)
        if damage == "config":
            (tmp_path / "config.json").write_text("{}")
        if damage == "cut":
            (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:300])
        with pytest.raises(WeightsError, match="vision tower"):
            ImageClip.load(tmp_path, self.CHOICE, None, "cpu")


def test_previews():
    views = torch.arange(16.0).view(16, 1, 1, 1).expand(16, 3, 20, 20) / 255
    assert Image.open(io.BytesIO(preview(views))).getpixel((3, 3)) == (1, 1, 1)
    grid = Image.open(io.BytesIO(grid_preview(views)))
    assert grid.size == (45, 45)
    reds = grid.getchannel(0)
    corners = [reds.getpixel(place) for place in ((0, 0), (44, 0), (0, 44), (44, 44), (22, 22))]
    assert corners == [1, 5, 9, 13, 0]
