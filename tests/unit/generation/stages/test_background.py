import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageSegmentation

from generation.schema.options import Models
from generation.stages import background
from generation.stages.background import BackgroundRemover, NothingInImage, recentre
from generation.weights import WeightsError, local_folder, lookup


@pytest.fixture
def choice(mini_models):
    return Models.load(mini_models).background


@pytest.fixture
def folder(choice, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(local_folder(lookup(choice)), tmp_path / "matting")


def test_alpha_has_the_images_size(choice, no_network):
    remover = BackgroundRemover.load(local_folder(lookup(choice)), choice, "cpu")
    alpha = remover.remove(torch.rand(2, 3, 50, 70))
    assert alpha.shape == (2, 1, 50, 70)
    assert alpha.dtype == torch.float32
    assert alpha.min() >= 0
    assert alpha.max() <= 1


def test_many_pictures_take_no_more_memory_than_two(choice, no_network, monkeypatch):
    """LGM cuts out 16 views for four requests, which would be 18.6 GiB of activations at full size."""
    remover = BackgroundRemover.load(local_folder(lookup(choice)), choice, "cpu")
    seen: list[int] = []
    remover._net.register_forward_pre_hook(lambda net, args: seen.append(len(args[0])))
    images = torch.rand(5, 3, 40, 40)
    together = remover.remove(images)
    monkeypatch.setattr(background, "_AT_ONCE", 2 * choice.image_size**2)
    assert torch.allclose(remover.remove(images), together, atol=1e-5)
    assert seen == [5, 2, 2, 1]


def test_half_precision_is_near(choice, no_network):
    folder, image = local_folder(lookup(choice)), torch.rand(1, 3, 64, 64)
    half = BackgroundRemover.load(folder, choice.model_copy(update={"dtype": "float16"}), "cpu").remove(image)
    assert torch.allclose(half, BackgroundRemover.load(folder, choice, "cpu").remove(image), atol=5e-3)
    assert torch.get_default_dtype() == torch.float32


def test_loading_fills_the_net_with_the_files_weights(choice, folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.weight"] *= 0
    weights["head.bias"] = torch.tensor([20.0])  # everything is object
    save_file(weights, folder / "model.safetensors")
    alpha = BackgroundRemover.load(folder, choice, "cpu").remove(torch.rand(1, 3, 32, 32))
    assert torch.allclose(alpha, torch.ones(1, 1, 32, 32))


def test_this_is_why_from_pretrained_is_not_used(folder):
    """The day this passes, the loader can go."""
    with pytest.raises((RuntimeError, AttributeError)):
        AutoModelForImageSegmentation.from_pretrained(folder, trust_remote_code=True)


def test_weights_must_be_exactly_the_classes(choice, folder):
    weights = load_file(folder / "model.safetensors")
    del weights["head.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"head\.bias"):
        BackgroundRemover.load(folder, choice, "cpu")


@pytest.mark.parametrize("name", ["config.json", "mini_matting.py", "model.safetensors"])
def test_an_incomplete_folder_is_named(choice, folder, name):
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=str(folder)):
        BackgroundRemover.load(folder, choice, "cpu")


def test_a_config_without_auto_map_is_named(choice, folder):
    (folder / "config.json").write_text(json.dumps({}))
    with pytest.raises(WeightsError, match="auto_map"):
        BackgroundRemover.load(folder, choice, "cpu")


@settings(max_examples=50, deadline=None)
@given(
    height=st.integers(20, 200), width=st.integers(20, 200), size=st.integers(32, 128),
    top=st.integers(0, 10), left=st.integers(0, 10), data=st.data(),
)  # fmt: skip
def test_recentre_puts_any_box_into_the_middle(height, width, size, top, left, data):
    bottom, right = data.draw(st.integers(top + 7, height)), data.draw(st.integers(left + 7, width))
    image, alpha = torch.zeros(3, height, width), torch.zeros(1, height, width)
    image[0] = 1.0  # red, also behind the object
    alpha[:, top:bottom, left:right] = 1.0
    cutout = recentre(image, alpha, size)
    assert cutout.shape == (4, size, size)
    rows, columns = torch.nonzero(cutout[3] > 0.5, as_tuple=True)
    tall, wide = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
    assert abs(max(tall, wide) - 0.8 * size) <= 1
    assert abs(tall / wide - (bottom - top) / (right - left)) <= 2 / min(tall, wide) * max(1, tall / wide)
    assert abs(float(rows.float().mean()) - (size - 1) / 2) <= 1
    assert abs(float(columns.float().mean()) - (size - 1) / 2) <= 1
    inside = cutout[:3, cutout[3] > 0.5]
    assert torch.allclose(inside, torch.tensor([1.0, 0, 0])[:, None].expand_as(inside), atol=1e-3)


def test_recentre_keeps_the_background_out_of_the_edge():
    image = torch.ones(3, 64, 64)
    image[:, 20:44, 20:44] = torch.tensor([0.0, 0, 1])[:, None, None]
    alpha = torch.zeros(1, 64, 64)
    alpha[:, 20:44, 20:44] = 1
    alpha[:, 19, 20:44] = 0.6  # a soft edge, blue like the object
    image[:, 19, 20:44] = torch.tensor([0.0, 0, 1])[:, None]
    cutout = recentre(image, alpha, 128)
    seen = cutout[:3, cutout[3] > 0.05]
    assert seen[0].max() < 1e-3
    assert seen[2].min() > 0.99


@pytest.mark.parametrize("level", [0.0, 0.4])
def test_an_empty_mask_is_named(level):
    with pytest.raises(NothingInImage):
        recentre(torch.rand(3, 32, 32), torch.full((1, 32, 32), level), 64)


@pytest.mark.parametrize(("level", "mask", "name"), [(float("nan"), 0.0, "picture"), (0.5, float("nan"), "mask")])
def test_a_broken_model_is_not_taken_for_an_empty_picture(level, mask, name):
    with pytest.raises(ValueError, match=f"the {name} is not finite"):
        recentre(torch.full((3, 32, 32), level), torch.full((1, 32, 32), mask), 64)


def test_a_speck_is_nothing():
    alpha = torch.zeros(1, 100, 100)
    alpha[:, 50, 50:55] = 1
    with pytest.raises(NothingInImage):
        recentre(torch.rand(3, 100, 100), alpha, 64)
