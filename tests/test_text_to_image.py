import pytest
import torch

from generation.settings import Models
from generation.text_to_image import TextToImage
from generation.weights import local_folder, lookup


@pytest.fixture(scope="module")
def model(mini_models) -> TextToImage:
    choice = Models.load(mini_models).text_to_image
    return TextToImage.load(local_folder(lookup(choice)), choice, "cpu")


def test_loads_and_samples_without_network(mini_models, no_network):
    choice = Models.load(mini_models).text_to_image
    image = TextToImage.load(local_folder(lookup(choice)), choice, "cpu").generate("a red cube", seed=1)
    assert image.shape == (3, choice.image_size, choice.image_size)
    assert image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1


def test_an_image_depends_on_prompt_and_seed_only(model):
    first = model.generate("a red cube", seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, model.generate("a red cube", seed=1))
    assert not torch.equal(first, model.generate("a red cube", seed=2))
    assert not torch.equal(first, model.generate("a blue cube", seed=1))


@pytest.mark.parametrize("prompt", ["word " * 200, "\u6728 \U0001f996 {prompt} {0} %s", "x"])
def test_unusual_prompts_are_only_prompts(model, prompt):
    assert model.generate(prompt, seed=0).isfinite().all()


def test_the_image_can_be_a_training_target(model):
    image = model.generate("a red cube", seed=1)
    pixel = torch.zeros(3, 1, 1, requires_grad=True)
    ((pixel - image) ** 2).mean().backward()  # an inference-mode tensor would refuse
    assert pixel.grad is not None
