import contextlib
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from bitsandbytes.nn import Linear4bit

from generation.accelerate import text_cache
from generation.accelerate.offload import Offloaded
from generation.accelerate.text_cache import truncation
from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from generation.schema.options import Models
from generation.settings import PROFILES
from generation.stages.self_check import SelfCheck, TextClip
from generation.stages.text_to_image import TextToImage
from generation.weights import local_folder, lookup


def load(mini_models, device="cpu", **changes) -> TextToImage:
    choice = Models.load(mini_models).text_to_image.model_copy(update=changes)
    return TextToImage.load(local_folder(lookup(choice)), choice, device)


@pytest.fixture(scope="module")
def model(mini_models) -> TextToImage:
    return load(mini_models)


def test_loads_and_samples_without_network(mini_models, no_network):
    choice = Models.load(mini_models).text_to_image
    (image,) = load(mini_models).generate(["a red cube"], seeds=[1])
    assert image.shape == (3, choice.image_size, choice.image_size)
    assert image.dtype == torch.float32
    assert image.min() >= 0
    assert image.max() <= 1


def test_an_image_depends_on_prompt_and_seed_only(model):
    (first,) = model.generate(["a red cube"], seeds=[1])
    torch.manual_seed(99)
    assert torch.equal(first, model.generate(["a red cube"], seeds=[1])[0])
    assert not torch.equal(first, model.generate(["a red cube"], seeds=[2])[0])
    assert not torch.equal(first, model.generate(["a blue cube"], seeds=[1])[0])


def test_an_image_does_not_depend_on_the_others(model):
    prompts, seeds = ["a red cube", "a green cone", "a red cube", "x"], [1, 1, 7, 2**32 - 1]
    together = model.generate(prompts, seeds)
    for image, prompt, seed in zip(together, prompts, seeds, strict=True):
        assert torch.allclose(image, model.generate([prompt], [seed])[0], atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-2  # the same words, another seed


def test_known_prompts_are_not_encoded_again(mini_models, monkeypatch):
    monkeypatch.setattr(text_cache, "KEPT", 2)
    model = load(mini_models)
    encoded: list[Any] = []
    encode = model._pipe.encode_prompt

    def count(prompt=None, *rest, **more):
        encoded.extend(prompt or [])
        return encode(prompt, *rest, **more)

    monkeypatch.setattr(model._pipe, "encode_prompt", count)
    first = model.generate(["a", "b", "a"], [1, 1, 2])
    assert encoded == ["a", "b"]
    again = model.generate(["b", "a"], [1, 1])
    assert encoded == ["a", "b"]
    assert torch.allclose(again[1], first[0], atol=1e-4)
    assert torch.allclose(again[0], first[1], atol=1e-4)
    model.generate(["c", "d", "e"], [1, 1, 1])  # more than are kept
    model.generate(["d"], [1])
    assert encoded == ["a", "b", "c", "d", "e"]
    model.generate(["a"], [1])
    assert encoded[-1] == "a"


def test_a_text_that_is_cut_is_told_by_each_model(model, mini_models):
    """The mini tokenizers have a token for each letter and read 16, with their marks; T5 has one for a word's start."""
    models: Any = Models.load(mini_models)
    entry = lookup(models.clip)
    check = SelfCheck(TextClip.load(local_folder(entry), models.clip, entry.clip, "cpu"))
    mvdream = MVDream.load(local_folder(lookup(models.mvdream)), "cpu", torch.float32)
    assert (model.truncation("a" * 14), check.truncation("a" * 14), mvdream.truncation("a" * 14)) == ({}, {}, None)
    assert model.truncation("a" * 15) == {"text_to_image CLIP": (16, 17), "text_to_image T5": (16, 17)}
    assert (check.truncation("a" * 15), mvdream.truncation("a" * 20)) == ({"self_check": (16, 17)}, (16, 22))


@pytest.mark.parametrize("word", ["a", "cube", "!"])
def test_what_is_cut_by_open_clip_s_own_tokenizer_is_what_it_does_not_read(word):
    tokenizer = open_clip.get_tokenizer("convnext_large_d")  # the validators'
    whole, cut_one = " ".join([word + " x"] * 37 + ["x"]), " ".join([word + " x"] * 37 + ["x x"])
    assert truncation(tokenizer, whole) is None
    assert truncation(tokenizer, cut_one) == (77, 78)
    assert torch.equal(tokenizer([whole]), tokenizer([cut_one]))
    assert int((tokenizer([whole]) == 49407).nonzero()[0, 1]) == 76  # the mark of the end, just inside


@pytest.mark.parametrize("prompt", ["word " * 200, "\u6728 \U0001f996 {prompt} {0} %s", "x"])
def test_unusual_prompts_are_only_prompts(model, prompt):
    assert model.generate([prompt], seeds=[0])[0].isfinite().all()


def test_the_image_can_be_a_training_target(model):
    (image,) = model.generate(["a red cube"], seeds=[1])
    pixel = torch.zeros(3, 1, 1, requires_grad=True)
    ((pixel - image) ** 2).mean().backward()  # an inference-mode tensor would refuse
    assert pixel.grad is not None


def test_four_bits_draw_nearly_the_same():
    choice = Models.load(PROFILES["tiny"][0]).text_to_image  # trained weights: random ones would show little
    prompts, seeds = ["a red cube", "a blue cone"], [1, 2]
    cube, cone = TextToImage.load(Path(choice.model), choice, "cpu").generate(prompts, seeds)
    choice = choice.model_copy(update={"quantization": "nf4"})
    small_cube, small_cone = TextToImage.load(Path(choice.model), choice, "cpu").generate(prompts, seeds)
    other = (cube - cone).abs().mean()
    for large, small in ((cube, small_cube), (cone, small_cone)):
        assert 0 < (large - small).abs().mean() < other / 10


def test_four_bits_are_in_all_large_layers(mini_models):
    pipe = load(mini_models, quantization="nf4")._pipe
    for part in (
        pipe.text_encoder_2.encoder,
        pipe.transformer.transformer_blocks,
        pipe.transformer.single_transformer_blocks,
    ):
        linears: list[Any] = [module for module in part.modules() if isinstance(module, torch.nn.Linear)]
        assert linears
        assert all(isinstance(module, Linear4bit) for module in linears)
        assert all(module.weight.quant_type == "nf4" and module.weight.bnb_quantized for module in linears)


def test_four_bits_may_be_t5s_alone(mini_models):
    pipe = load(mini_models, quantization_t5="nf4")._pipe
    assert any(isinstance(module, Linear4bit) for module in pipe.text_encoder_2.modules())
    assert not any(isinstance(module, Linear4bit) for module in pipe.transformer.modules())


def test_an_offloaded_model_is_on_its_device_only_while_it_works(monkeypatch):
    """The moves alone: a copy stands for what is on a GPU."""
    model = torch.nn.Linear(3, 2)
    offloaded = Offloaded(model, "cpu")
    offloaded.offload()
    pinned, before = model.weight.data_ptr(), model.weight.detach().clone()
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())

    def work() -> None:
        with offloaded.on_device():
            assert model.weight.data_ptr() != pinned
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        work()
    assert model.weight.data_ptr() == pinned
    assert torch.equal(model.weight, before)


def test_t5_is_on_the_device_only_while_it_encodes(mini_models, monkeypatch):
    plain = load(mini_models).generate(["a red cube"], [1])[0]
    model = load(mini_models, offload_t5=True)
    moves: list[str] = []

    def on_device(offloaded: Offloaded) -> contextlib.nullcontext[None]:
        moves.append("on device")
        return contextlib.nullcontext()

    monkeypatch.setattr(Offloaded, "on_device", on_device)
    assert torch.allclose(model.generate(["a red cube"], [1])[0], plain, atol=1e-5)
    model.generate(["a red cube"], [2])  # known: it stays offloaded
    assert moves == ["on device"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_t5_is_unchanged_by_offloading(mini_models, quantization):
    choice = {"quantization": quantization, "dtype": "bfloat16"}
    drawn = [load(mini_models, "cuda", **choice, **more) for more in ({}, {"offload_t5": True})]
    t5 = drawn[1]._pipe.text_encoder_2
    assert all(parameter.device.type == "cpu" for parameter in t5.parameters())
    for prompt in ("a red cube", "a blue cone"):
        loaded, offloaded = (model._embed([prompt])[0] for model in drawn)
        assert torch.equal(loaded, offloaded)
    assert all(parameter.is_pinned() for parameter in t5.parameters())
