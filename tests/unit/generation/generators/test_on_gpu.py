"""What generators do on a GPU alone, on one that pretends: warm up, capture, and take turns with another generator.

Their tensors' devices and types are as there, and a CUDA graph holds no copy from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from generation.accelerate.cuda_graph import GraphedFunction
from generation.accelerate.offload import Offloaded
from generation.generators.base import Generator, Subject
from generation.generators.lgm.generator import Lgm
from generation.generators.lgm.network import LGM, Config
from generation.generators.lgm.options import LgmOptions
from generation.generators.multiview import ImageDream, MVDreamViews
from generation.generators.trellis.condition import Condition
from generation.generators.trellis.generator import Trellis
from generation.generators.trellis.options import TrellisOptions
from generation.generators.trellis.weights import Networks
from generation.stages.background import recentre
from tests.support import mini_checkpoints, mini_trellis
from tests.support.pretend_gpu import DEVICE, GpuTensor, pretend_gpu

SMALL = Config(
    down_channels=(8, 16), down_attention=(False, True), up_channels=(16, 8), up_attention=(True, False),
    attention_heads=2, norm_groups=4, input_size=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with pretend_gpu():
        yield


#: views are drawn in bfloat16, which a CPU is faster with
def lgm(views: ImageDream | MVDreamViews, **options: object) -> Lgm:
    network = LGM(SMALL).half().to(DEVICE).eval().requires_grad_(False)

    def whole(images: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(images[:, :1])

    return Lgm(network, views, LgmOptions(**options), DEVICE, whole)  # type: ignore[arg-type]


def of_picture(mini_models: Path, tmp_path: Path) -> Lgm:
    mini_checkpoints.imagedream(tmp_path)
    return lgm(ImageDream.load(tmp_path, DEVICE, torch.bfloat16, steps=2))


def of_words(mini_models: Path, tmp_path: Path) -> Lgm:
    views = MVDreamViews.load(mini_models.parent / "mvdream", DEVICE, torch.bfloat16, steps=2)
    return lgm(views, views_from="words", recentre_views=True)


def of_both(mini_models: Path, tmp_path: Path) -> Lgm:
    views = MVDreamViews.load(mini_models.parent / "mvdream", DEVICE, torch.bfloat16, steps=2, known_view=True)
    return lgm(views, views_from="picture_and_words")


def trellis(mini_models: Path, tmp_path: Path) -> Trellis:
    mini_trellis.build(tmp_path)
    networks = Networks.load(tmp_path / "trellis", str(DEVICE), torch.float16)
    condition = Condition.load(tmp_path / "dinov2", str(DEVICE), torch.float16)
    return Trellis(networks, condition, TrellisOptions(structure_steps=2, slat_steps=2), str(DEVICE))


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(of_picture, marks=pytest.mark.slow),
        of_words,
        pytest.param(of_both, marks=pytest.mark.slow),
        trellis,
    ],
)
def test_from_warm_up_to_gaussians(load: Callable[[Path, Path], Generator], mini_models, tmp_path):
    generator = load(mini_models, tmp_path)
    generator.offload()  # as where two take turns
    generator.onload()
    generator.warm_up(1, lambda text: None)
    size = 8 if generator.cutout is None else generator.cutout.size
    cutout = torch.rand(4, size, size, device=DEVICE)
    works = [generator.begin(Subject("a ball", cutout, 0))]
    generator.tick(works)
    generator.offload()
    generator.onload()
    works.append(generator.begin(Subject("a cube", cutout, 1)))
    while unfinished := [work for work in works if not work.done]:
        generator.tick(unfinished)
    for work in works:
        gaussians = work.gaussians()
        gaussians.check()
        assert all(isinstance(field, GpuTensor) for field in gaussians.tensors().values())


@pytest.mark.slow
def test_encoders_that_are_offloaded_are_on_the_gpu_while_they_encode(mini_models, tmp_path):
    mini_checkpoints.imagedream(tmp_path)
    conditions = []
    for offload in (False, True):
        views = ImageDream.load(tmp_path, DEVICE, torch.bfloat16, steps=2, offload_encoders=offload)
        views._capture_encoder(1)
        (sampling,) = views.begin([""], [torch.ones(4, 32, 32, device=DEVICE)], [0])
        encoders = views._words.encoder, views._image_encoder
        assert {each.is_there for encoder in encoders for each in encoder.parameters()} == {not offload}
        assert all(parameter.is_there for parameter in views._unet.parameters())
        conditions.append((sampling.words.cpu(), sampling.known[0].cpu()))
    assert torch.equal(*(words for words, _ in conditions))
    assert torch.equal(*(known for _, known in conditions))


@pytest.mark.parametrize("position", ["absolute", "ray"])
def test_lgms_pass_can_be_captured(position):
    network = LGM(Config(**{**vars(SMALL), "position": position})).half().to(DEVICE)
    rays, views = network.rays(), torch.rand(1, 4, 3, 20, 20, device=DEVICE)
    captured = GraphedFunction(lambda views: (network(views, rays),))
    with torch.no_grad():
        captured.capture(views)
        (splats,) = captured(torch.rand(1, 4, 3, 20, 20, device=DEVICE))
    assert splats.dtype == torch.float32


def test_lgms_weights_come_back_in_the_order_that_convolutions_want():
    views: Any = SimpleNamespace(
        image_size=16, warm_up=lambda most, progress: None, offload=lambda: None, onload=lambda: None
    )
    generator = lgm(views)
    for _ in range(2):  # before it warms up, where two take turns, and afterwards
        generator.offload()
        generator.onload()
        generator.warm_up(1, lambda text: None)
    generator.offload()
    generator.onload()
    weight = generator._network.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_a_result_of_a_graph_stays_when_another_is_replayed():
    """As where a request's views are decoded while another one's are sampled: graphs share their memory."""
    one, other = (GraphedFunction(lambda x: (x + 1,)) for _ in range(2))
    for captured in (one, other):
        captured.capture(torch.zeros(2, device=DEVICE))
    (first,), (second,) = one(torch.ones(2, device=DEVICE)), other(torch.zeros(2, device=DEVICE))
    one(torch.zeros(2, device=DEVICE))
    assert first.tolist() == [2.0, 2.0]
    assert second.tolist() == [1.0, 1.0]


class TestThePretence:
    """That it fails where a GPU would."""

    @pytest.mark.parametrize(
        "mistake",
        [
            lambda x: x + torch.ones(3),
            lambda x: x @ torch.ones(3, 3, device=DEVICE, dtype=torch.float16),
            lambda x: torch.cat([x, torch.ones(3)]),
        ],
    )
    def test_operands_on_two_devices_or_of_two_types(self, mistake):
        with pytest.raises(RuntimeError, match=r"same device|same dtype"):
            mistake(torch.ones(3, device=DEVICE))

    @pytest.mark.parametrize(
        "mistake",
        [
            lambda x: x - x.new_tensor([1.0, 2.0, 3.0]),
            lambda x: x + x.cpu().to(DEVICE),
            lambda x: x * float(x.sum()),
            lambda x: x[x > 0],
            lambda x: x.index_select(0, torch.nonzero(x)[:, 0]),
        ],
    )
    def test_what_a_cuda_graph_can_not_hold(self, mistake):
        x = torch.ones(3, device=DEVICE)
        mistake(x)
        with pytest.raises(RuntimeError, match="capturing"):
            GraphedFunction(lambda x: (mistake(x),)).capture(x)

    def test_weights_that_are_offloaded(self):
        layer = torch.nn.Linear(3, 3).to(DEVICE)
        offloaded, x = Offloaded(layer, DEVICE), torch.ones(3, device=DEVICE)
        before = layer(x)
        offloaded.offload()
        with pytest.raises(RuntimeError, match="offloaded"):
            layer(x)
        offloaded.onload()
        assert torch.equal(layer(x).cpu(), before.cpu())


def test_a_picture_is_cut_out_where_it_is():
    cutout = recentre(torch.rand(3, 9, 9, device=DEVICE), torch.ones(1, 9, 9, device=DEVICE), 16)
    assert isinstance(cutout, GpuTensor)
