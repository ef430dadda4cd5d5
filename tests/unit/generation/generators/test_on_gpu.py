"""What generators do on a GPU alone, on one that pretends: warm up, capture, and take turns with another generator.

Their tensors' devices and types are as there, and a CUDA graph holds no copy from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

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
from generation.generators.trellis.generator import Trellis, TrellisWork
from generation.generators.trellis.layers import Sequences, attend
from generation.generators.trellis.options import TrellisOptions
from generation.generators.trellis.splats import capped, sharpened, to_gaussians
from generation.generators.trellis.weights import Networks
from generation.stages.background import recentre
from tests.support import mini_checkpoints, mini_trellis
from tests.support import pretend_gpu as pretend_gpu_module
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


def trellis(mini_models: Path, tmp_path: Path, **options: Any) -> Trellis:
    mini_trellis.build(tmp_path)
    networks = Networks.load(tmp_path / "trellis", str(DEVICE), torch.float16)
    condition = Condition.load(tmp_path / "dinov2", str(DEVICE), torch.float16)
    return Trellis(
        networks, condition, TrellisOptions(**{"structure_steps": 2, "slat_steps": 2} | options), str(DEVICE)
    )


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


def of_pictures(generator: Trellis, *seeds: int) -> list[TrellisWork]:
    pictures = [torch.rand(4, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return [generator.begin(Subject("", each.to(DEVICE), seed)) for each, seed in zip(pictures, seeds, strict=True)]


def counted(owner: type, name: str) -> Any:
    return mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))


@pytest.mark.parametrize("structures", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_trelliss_captured_steps_are_as_those_that_are_not(mini_models, tmp_path, structures):
    """Of two works that take turns, each alone, then beside each other, with an offload between."""
    generator = trellis(mini_models, tmp_path, structures=structures, structure_steps=3, structure_interval=(0.8, 1.0))

    def made() -> torch.Tensor:
        first, second = works = of_pictures(generator, 0, 1)
        generator.tick([first])
        generator.tick([second])
        generator.offload()
        generator.onload()
        generator.tick([first])
        generator.tick(works)
        generator.tick([second])
        assert all(work.voxels is not None for work in works)
        return torch.cat([work.structure.cpu() for work in works])

    before = made()
    generator.warm_up(1, lambda text: None)
    with counted(GraphedFunction, "capture") as captures, counted(pretend_gpu_module._Graph, "replay") as replays:
        after = made()
    assert (captures.call_count, replays.call_count) == (2, 4)  # after the offload guided and not guided
    assert torch.equal(before, after)


def test_the_host_waits_for_nothing_from_trelliss_latents_to_its_gaussians(mini_models, tmp_path):
    """It all could be captured: no copy to or from the host, nothing that it waits for."""
    generator = trellis(mini_models, tmp_path)
    networks, works = generator._networks, of_pictures(generator, 0, 1)
    for _ in range(3):
        generator.tick(works)
    latents = torch.cat([work.latents for work in works if work.latents is not None])
    times = torch.full((2,), 700.0, device=DEVICE)
    contexts = [work.context for work in works if work.context is not None]
    voxels, doubled = generator._join([work.voxels for work in works if work.voxels is not None], 1)

    def step(latents: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, ...]:
        velocities = networks.slat_flow(latents, times, contexts, voxels, doubled)
        splats = [to_gaussians(raw) for raw in networks.gaussian_decoder(latents, voxels.fine)]
        return velocities, *(field for each in splats for field in sharpened(capped(each, 3000)).tensors().values())

    with torch.no_grad():
        eager = step(latents, times)  # which also makes tables that all steps share
        captured = GraphedFunction(step)
        captured.capture(latents, times)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(eager, captured(latents, times), strict=True))


def test_attention_of_different_lengths_is_as_that_of_each_alone():
    """Also where one has no tokens. FlashAttention misses what is longer than it is told."""
    lengths, others, cpu = [5, 0, 9, 1], [3, 2, 4, 7], torch.device("cpu")
    q, k, v = (torch.randn(sum(each), 2, 8).half() for each in (lengths, others, others))

    def attended(device: torch.device, queries_shorter: int = 0, keys_shorter: int = 0) -> torch.Tensor:
        queries, keys = (Sequences.of(each, device) for each in (lengths, others))
        queries = replace(queries, longest=queries.longest - queries_shorter)
        keys = replace(keys, longest=keys.longest - keys_shorter)
        return attend(q.to(device), k.to(device), v.to(device), queries, keys).cpu()

    alone = attended(cpu)
    assert torch.allclose(attended(DEVICE), alone, atol=5e-3)
    assert not torch.allclose(attended(DEVICE, queries_shorter=1), alone, atol=1e-2)
    assert not torch.allclose(attended(DEVICE, keys_shorter=1), alone, atol=1e-2)
    alike = attend(q[:5], k[:3], v[:3], Sequences.of_equal_length(1, 5, cpu), Sequences.of_equal_length(1, 3, cpu))
    assert torch.allclose(alike, alone[:5], atol=5e-3)


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
