"""What makes the guidance fast leaves what it computes as it is. Graphs need a GPU: see scripts.bench.pipeline."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from generation.accelerate import cuda_graph
from generation.accelerate.compiled import ChannelwiseGroupNorm, FusedUpsample, compile_autoencoder
from generation.accelerate.cuda_graph import COMPILED_SIZES, GraphedFunction, split_batch
from generation.accelerate.fused import fuse_encoder
from generation.accelerate.group_norm import FusedGroupNorm, group_norm
from generation.accelerate.unet import compile_unet
from generation.generators.dreamgaussian.guidance.distillation import Distillation, with_gradient
from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from generation.generators.dreamgaussian.guidance.zero123 import Zero123
from generation.settings import ROOT
from generation.splats.cameras import orbit
from tests.support.tensors import gradient as gradient_of


@given(st.integers(1, 40))
def test_pieces_cover_all_scenes_in_compiled_sizes(scenes):
    cuts = split_batch(scenes)
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(scenes))
    assert {cut.stop - cut.start for cut in cuts} <= set(COMPILED_SIZES)
    assert len(cuts) <= scenes // max(COMPILED_SIZES) + 2


@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 8, 9)])
def test_normalisation_from_channels_is_group_normalisation(shape):
    torch.manual_seed(0)
    plain = torch.nn.GroupNorm(4, shape[1])
    torch.nn.init.normal_(plain.weight)
    torch.nn.init.normal_(plain.bias)
    x = torch.randn(shape) * 3 + 2
    assert torch.allclose(ChannelwiseGroupNorm(plain)(x), plain(x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_normalisation_from_channels_far_from_zero(compiles):
    """The mean of the squares less the square of the mean is off by 0.04 here."""
    if compiles and " " in sys.prefix:
        pytest.skip("torch's compiler for CPUs does not find its headers in a folder with a space")
    torch.manual_seed(0)
    plain = torch.nn.GroupNorm(4, 16)
    x = 300 + torch.randn(2, 16, 64, 64)
    ours = ChannelwiseGroupNorm(plain)
    result = torch.compile(ours)(x) if compiles else ours(x)
    assert torch.allclose(result.double(), plain.double()(x.double()), atol=2e-4)


@torch.no_grad()
def test_normalisation_of_images_is_group_normalisation():
    torch.manual_seed(0)
    plain = torch.nn.GroupNorm(4, 12)
    torch.nn.init.normal_(plain.weight)
    torch.nn.init.normal_(plain.bias)
    x, added = (torch.randn(3, 12, 5, 7) * 3 + 2).contiguous(memory_format=torch.channels_last), torch.randn(3, 12)
    assert torch.allclose(FusedGroupNorm(plain)(x), plain(x), atol=1e-5)
    assert torch.allclose(FusedGroupNorm(plain)(x, added[0]), plain(x + added[0, :, None, None]), atol=1e-5)
    expected = torch.nn.functional.silu(plain(x + added[:, :, None, None]))
    assert torch.allclose(FusedGroupNorm(plain, silu=True)(x, added), expected, atol=1e-5)
    given = (x, added, plain.weight, plain.bias, 4, 1e-5, True)
    torch.library.opcheck(group_norm, given, test_utils=("test_schema", "test_faketensor"))


@torch.no_grad()
def test_upsampling_in_one_is_upsampling_and_then_a_convolution():
    torch.manual_seed(0)
    plain = Upsample2D(8, use_conv=True, out_channels=6)
    x = torch.randn(2, 8, 5, 7)
    assert torch.allclose(FusedUpsample(plain)(x), plain(x), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(9, 13\)"):
        FusedUpsample(plain)(x, (9, 13))


@pytest.mark.parametrize("kind", ["mvdream", "zero123"])
def test_what_is_prepared_for_the_compiler_computes_the_same(kind, mini_models):
    folder = mini_models.parent / kind
    guidance: Distillation
    if kind == "mvdream":
        guidance = text = MVDream.load(folder, "cpu", torch.float32)
        conditions = [text.prepare(words, "") for words in ("a", "b", "c")]
    else:
        guidance = image = Zero123.load(folder, "cpu", torch.float32, stable=False)
        conditions = [image.prepare(torch.full((4, 32, 32), grey), 0.0) for grey in (0.1, 0.5, 0.9)]
    for model in (guidance._vae, guidance._unet):
        for parameter in model.parameters():  # no bias is zero, no scale is one
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    views = 3 * guidance.views
    images = torch.rand(views, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    poses = orbit(10.0, torch.arange(views) * 90.0, 2.5, 49.1, 8, 8).camera_to_world

    def loss_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.clone().requires_grad_()
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        loss = guidance.loss(
            lambda: pixels, poses, torch.stack(conditions), torch.tensor([0.3, 0.5, 0.7]), generators, 5.0
        )
        loss.sum().backward()
        return loss.detach(), gradient_of(pixels)

    before = loss_and_gradient()
    compile_unet(guidance._unet)
    compile_autoencoder(guidance._vae)
    in_order = []
    for module in guidance._unet.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_hook(
                lambda module, args, out: in_order.append(out[0].is_contiguous(memory_format=torch.channels_last))
            )
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes on a CPU
        after = loss_and_gradient()
    assert in_order
    assert all(in_order)
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def test_what_is_compiled_is_kept_beside_the_code():
    """Torch decides where as soon as its compiler is imported: it must have been told before."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    code = (
        f"import generation, os, sys; print('torch' in sys.modules, *(os.environ[name] for name in {names}), sep='\\n')"
    )
    free = {name: value for name, value in os.environ.items() if name not in names}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=free, cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept = ROOT / ".cache" / "compiled"
    assert printed.stdout.splitlines() == ["False", str(kept), str(kept / "triton")]


def test_shapes_that_were_not_captured_are_computed():
    double = GraphedFunction(lambda x, factor: (factor * x,))
    assert double(torch.ones(2), constants=(2.0,))[0].tolist() == [2.0, 2.0]


def test_a_known_gradient_is_weighted_by_scene():
    images = torch.zeros(4, 3, 2, 2, requires_grad=True)
    gradient = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    losses = with_gradient(images, torch.tensor([1.0, 2.0]), gradient)
    assert losses.tolist() == [1.0, 2.0]
    (losses * torch.tensor([1.0, 10.0])).sum().backward()
    assert gradient_of(images)[:, 0, 0, 0].tolist() == [0.0, 1.0, 20.0, 30.0]


def test_what_was_forgotten_is_captured_again_when_it_is_called(monkeypatch) -> None:
    captured: list[tuple[int, ...]] = []

    class Graph:
        def __init__(self, outputs: torch.Tensor) -> None:
            self.outputs = outputs

        def replay(self) -> None:
            self.outputs += 1

    def capture(step: cuda_graph.GraphedFunction, *inputs: torch.Tensor, constants: tuple = ()) -> None:
        captured.append(tuple(inputs[0].shape))
        outputs = torch.zeros(1)
        step._graphs[cuda_graph._key(inputs, constants)] = cuda_graph._Graph(Graph(outputs), inputs, (outputs,))

    monkeypatch.setattr(cuda_graph.GraphedFunction, "capture", capture)
    step = cuda_graph.GraphedFunction(lambda x: (x,))
    step.capture(torch.zeros(2))
    step.capture(torch.zeros(3))
    step(torch.ones(2))
    step.forget()
    step.forget()
    assert not step._graphs
    assert step(torch.ones(2))[0].item() == 1
    assert captured == [(2,), (3,), (2,)]
    step(torch.ones(2))
    assert captured == [(2,), (3,), (2,)]
    x = torch.ones(4)
    assert step(x)[0] is x  # never captured


def test_a_capture_without_memory_is_tried_again(monkeypatch) -> None:
    """Otherwise the step would be launched kernel by kernel from then on."""
    captured = []

    def capture(step: cuda_graph.GraphedFunction, *inputs: torch.Tensor, constants: tuple = ()) -> None:
        captured.append(inputs)
        if len(captured) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    step = cuda_graph.GraphedFunction(lambda x: (x,))
    x = torch.ones(2)
    step._graphs[cuda_graph._key((x,), ())] = cuda_graph._Graph(None, (x,), (x,))
    step.forget()
    monkeypatch.setattr(cuda_graph.GraphedFunction, "capture", capture)
    with pytest.raises(torch.OutOfMemoryError):
        step(x)
    step(x)
    step(x)
    assert len(captured) == 2


class Pooled:
    """What stands in for ``torch.cuda.CUDAGraph``. ``given`` are the pools that graphs were captured into."""

    given: ClassVar[list[object]] = []

    def __init__(self) -> None:
        self.own: object = None

    def pool(self) -> object:
        return self.own

    def replay(self) -> None:
        pass


@contextmanager
def into(graph: Pooled, pool: object = None) -> Iterator[None]:
    Pooled.given.append(pool)
    graph.own = pool or object()
    yield


def test_graphs_of_all_functions_share_one_pool_while_any_of_them_lives(monkeypatch) -> None:
    """A pool that its last graph has left can not be captured into: torch's allocator asserts that."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(Pooled, "given", [])
    monkeypatch.setattr(cuda_graph, "_alive", WeakSet())
    monkeypatch.setattr(cuda_graph, "_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Pooled)
    monkeypatch.setattr(torch.cuda, "graph", into)
    one, other = (GraphedFunction(lambda x: (x + 1,)) for _ in range(2))
    one.capture(torch.ones(2))
    one.capture(torch.ones(1))
    other.capture(torch.ones(2))
    first, *more = Pooled.given
    assert first is None
    assert more == [more[0]] * 2 != [None, None]
    one.forget()
    other.capture(torch.ones(3))
    assert Pooled.given[-1] is more[0]
    other.forget()
    one.capture(torch.ones(2))
    assert Pooled.given[-1] is None
    (result,) = one(torch.ones(2))
    assert result.data_ptr() != next(iter(one._graphs.values())).outputs[0].data_ptr()


class Full(TorchDispatchMode):
    """Memory that lasts for so many operations."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        self.left = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("part", ["_unet", "_vae"])
def test_what_ran_out_of_memory_while_it_was_rewritten_can_be_again(part, mini_models, monkeypatch) -> None:
    """Warm-up begins again for fewer at once. Wherever it stopped, the network must come out the same."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    whole = MVDream.load(mini_models.parent / "mvdream", "cpu", torch.float32)
    for parameter in (*whole._unet.parameters(), *whole._vae.parameters()):  # no bias is zero, no scale is one
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    fresh = copy.deepcopy(getattr(whole, part))
    views = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    words = whole.prepare("a", "")[:1]
    cameras = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))

    def rewrite(model: Any) -> None:
        if part == "_unet":
            compile_unet(model)
        else:
            fuse_encoder(model)
            compile_autoencoder(model)

    def seen(model: Any) -> torch.Tensor:
        if part == "_unet":
            return model(views, torch.full((4,), 500), words, class_labels=cameras).sample
        weights = model.encoder.conv_out.weight.flatten(), model.encoder.steps[0].weights[0].forward.flatten()
        return torch.cat([*weights, model.decode(images[:, :1].expand(1, 4, 32, 32)).sample.flatten()])

    once, counter = copy.deepcopy(fresh), Full(1_000_000)
    with counter:
        rewrite(once)
    expected, operations = seen(once), 1_000_000 - counter.left
    if part == "_unet":
        assert torch.allclose(expected, seen(fresh), atol=1e-4)
    for after in range(0, operations, operations // 12):
        model = copy.deepcopy(fresh)
        with pytest.raises(torch.OutOfMemoryError), Full(after):
            rewrite(model)
        rewrite(model)
        assert torch.equal(seen(model), expected)


@torch.no_grad()
def test_no_weight_is_kept_twice(mini_models, monkeypatch) -> None:
    """Where projections are joined diffusers keeps the originals; with upsampling the 3x3 kernel would stay."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    unet = MVDream.load(mini_models.parent / "mvdream", "cpu", torch.float32)._unet
    before = sum(parameter.numel() for parameter in unet.parameters())
    kernels = sum(each.conv.weight.numel() for each in unet.modules() if isinstance(each, Upsample2D))
    compile_unet(unet)
    after = {parameter.data_ptr(): parameter.numel() for parameter in unet.parameters()}
    (texts,) = (hook._weight.numel() for hook in unet._forward_pre_hooks.values())
    upsampling = kernels * 16 // 9 - kernels
    biases = before // 100  # some are joined, some are gone
    assert before - biases < sum(after.values()) + texts - upsampling <= before
