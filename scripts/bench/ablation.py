"""What each way of making the guidance's step faster saves: the step with all of them, and without one after the other.

    .venv/bin/python -m scripts.bench.ablation --seconds 230 --json figures.json

MVDream at full size, random weights, half precision, on a GPU, all in one run: medians of replays of a CUDA graph. What
is saved is told as a share of a request of the default config, of which the rest was measured before (docs/SPEED.md).
Nothing new begins after ``--seconds``. ``--tiny`` tries the script out on a CPU, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generation.accelerate import compiled, fused, group_norm, unet
from generation.generators.dreamgaussian.guidance.distillation import distil
from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from scripts.bench import full_size
from scripts.bench.guidance import step_inputs

ITERATIONS = 250
# Of one request, and of four in flight together, on an H200 before any of this was left out.
REQUEST_S = {1: 3.80, 4: 4 * 2.80}
REPLAYS = 30
TINY = full_size.TINY / "mvdream"

# ---- the encoder: each changes an encoder that is fused already, and nothing is compiled anew ----


def small_images(encoder: Any) -> Any:
    return mock.patch.object(fused, "is_small", return_value=False)


def sums_while_adding(encoder: Any) -> Any:
    for step in encoder.steps:
        if isinstance(step, fused.ResidualBlock):
            step.following = None
    return nullcontext()


def backward_convolutions(encoder: Any) -> Any:
    """Gradients as cuDNN's own, of the forward kernels."""

    def by_input(gradient: Tensor, weight: Tensor, padding: int, like: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.convolution_backward(
            gradient, like, weight, None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return result

    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor | None, ...]:
        gradient, block = outward[0], ctx.block
        x, middle, *values = ctx.saved_tensors
        first, second = (weights.forward for weights in block.weights)
        inner = by_input(gradient, second, 1, middle)
        inner = fused._backward(inner, middle, fused.Statistics(*values[4:]), block.norms[1])
        outer = by_input(inner, first, 1, x)
        around = gradient if block.shortcut is None else by_input(gradient, block.shortcut.forward, 0, x)
        return fused._backward(outer, x, fused.Statistics(*values[:4]), block.norms[0], around), None, None

    return mock.patch.object(fused._Residual, "backward", staticmethod(backward))


ENCODER: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "all": (),
    "all, once more": (),
    "without one kernel for small images": (small_images,),
    "without sums while adding": (sums_while_adding,),
    "without convolutions as gradients": (backward_convolutions,),
    "without these three": (small_images, sums_while_adding, backward_convolutions),
}

COMPILED: dict[str, tuple[Callable[[Any], Any], ...]] = {"compiled and no more": ()}

# ---- the UNet: each is a patch under which a new one is brought into form ----


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class _TimeOneByOne(unet.TimeProjections):
    def forward(self, emb: Tensor) -> Tensor:
        emb = emb if self.before is None else self.before(emb)
        ends = torch.tensor(self._widths).cumsum(0).tolist()
        for block, begin, end in zip(self._blocks, [0, *ends], ends, strict=False):
            block.time = F.linear(F.silu(emb), self.weight[begin:end], self.bias[begin:end])
        return emb


class _Nothing:
    def __init__(self, *_: Any) -> None: ...

    def __call__(self, *_: Any) -> None: ...


def plain_norm(plain: nn.GroupNorm, silu: bool = False) -> nn.Module:
    return nn.Sequential(plain, nn.SiLU()) if silu else plain


ONE_KERNEL = ((group_norm, "ONE_KERNEL", 0),)
TIME = ((unet, "TimeProjections", _TimeOneByOne),)
BIASES = ((unet, "_take_biases_of_upsampling", lambda _: None),)
TEXT = ((unet, "TextProjections", _Nothing),)
UPSAMPLING = ((compiled, "FusedUpsample", lambda plain: plain),)
PROJECTIONS = ((unet, "_join_projections", lambda _: None),)
BLOCKS = ((unet, "_is_usual", lambda _: False), (unet, "FusedGroupNorm", plain_norm))
SMALL = (*ONE_KERNEL, *TIME, *BIASES)


def only_compiled(model: Any) -> None:
    compiled.compile_blocks(model, (compiled.ResnetBlock2D, unet.Transformer2DModel))


UNET: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "all": (),
    "without one kernel for small images": ONE_KERNEL,
    "without the time step's joined product": TIME,
    "without biases in the next block": BIASES,
    "without these three": SMALL,
    "all, once more": (),
    "without upsampling as one transposed convolution": UPSAMPLING,
    "without own residual blocks and normalisations (compiled)": BLOCKS,
    "compiled and no more": ((unet, "compile_unet", only_compiled), *UPSAMPLING),
    "without the text's joined product": TEXT,
    "without joined projections": PROJECTIONS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=230.0)
    parser.add_argument("--scenes", nargs="+", type=int, default=[4, 1])
    parser.add_argument("--json", type=Path, help="write all figures there, after each")
    parser.add_argument("--only", default="", help="variants whose name has this in it, besides those with all")
    parser.add_argument("--tiny", action="store_true", help="try the script out")
    args = parser.parse_args()
    device = "cpu" if args.tiny else "cuda"
    say(f"{'a CPU' if args.tiny else torch.cuda.get_device_name()}, torch {torch.__version__}")
    ends = time.monotonic() + args.seconds
    figures: list[dict[str, Any]] = []
    expected: dict[tuple[str, int], Tensor] = {}
    base: dict[tuple[str, int], float] = {}
    parts = (("encoder", ENCODER, encoder_ms), ("UNet", UNET, unet_ms), ("encoder", COMPILED, compiled_encoder_ms))
    for part, variants, measure in parts:
        for name, changes in variants.items():
            if args.only not in name and not name.startswith("all"):
                continue
            if time.monotonic() > ends:
                say(f"{part}, {name}: no time left")
                continue
            started = time.perf_counter()
            for scenes, (ms, result) in measure(device, changes, args.scenes).items():
                result = result.float().cpu()
                wanted = expected.setdefault((part, scenes), result)
                error = float((result - wanted).abs().max() / wanted.abs().max())
                more = ms - base.setdefault((part, scenes), ms)
                share = float("nan") if args.tiny else more * ITERATIONS / 1e3 / REQUEST_S[scenes]
                figures.append(
                    {"part": part, "variant": name, "scenes": scenes, "ms": ms, "more_ms": more, "share": share,
                     "error": error}
                )  # fmt: skip
                say(f"{part}, {name}, {scenes} scene(s): {ms:.3f} ms, {more:+.3f}: {share:+.2%} of a request; "
                    f"error {error:.0e}")  # fmt: skip
                if args.json:
                    args.json.write_text(json.dumps(figures, indent=1))
            say(f"    {time.perf_counter() - started:.0f} s for it")


def guidance_on(device: str) -> MVDream:
    if device == "cpu":
        return MVDream.load(TINY, device, torch.float32)
    return full_size.mvdream(device)


def encoder_ms(device: str, changes: Any, counts: list[int]) -> dict[int, tuple[float, Tensor]]:
    """By the number of scenes: one forward and backward pass, and the gradient by the images."""
    guidance = guidance_on(device)
    fused.fuse_encoder(guidance._vae)
    return _encoder_ms(guidance, changes, counts)


def compiled_encoder_ms(device: str, changes: Any, counts: list[int]) -> dict[int, tuple[float, Tensor]]:
    torch._dynamo.reset()
    return _encoder_ms(guidance_on(device), changes, counts)


def _encoder_ms(guidance: MVDream, changes: Any, counts: list[int]) -> dict[int, tuple[float, Tensor]]:
    device = guidance._unet.device.type
    compiled.compile_autoencoder(guidance._vae)
    found = {}
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change(guidance._vae.encoder))
        for scenes in counts:
            images, _, _, _, noise = step_inputs(guidance, scenes)

            def step(images: Tensor, noise: Tensor, scenes: int = scenes) -> Tensor:
                return distil(images, guidance._latents, lambda _: noise, scenes)[1]

            found[scenes] = measured(device, step, images, noise)
    return found


def unet_ms(device: str, changes: Any, counts: list[int]) -> dict[int, tuple[float, Tensor]]:
    """By the number of scenes: one guided noise, and what it is."""
    torch._dynamo.reset()
    guidance = guidance_on(device)
    found = {}
    with patched(*changes):
        unet.compile_unet(guidance._unet)
        for scenes in counts:
            _, poses, words, t, noise = step_inputs(guidance, scenes)
            steps = t.repeat_interleave(guidance.views)

            @torch.no_grad()
            def step(noisy: Tensor, steps: Tensor, poses: Tensor, words: Tensor) -> Tensor:
                return guidance._guided_noise(noisy, steps, poses, words, 50.0)

            found[scenes] = measured(device, step, noise.to(guidance._unet.dtype), steps, poses, words)
    return found


def measured(device: str, function: Callable[..., Tensor], *inputs: Tensor) -> tuple[float, Tensor]:
    """Milliseconds of a replay of the function as a CUDA graph, the median, and its result."""
    if device == "cpu":
        with torch.compiler.set_stance("force_eager"):
            started = time.perf_counter()
            return (function(*inputs), 1e3 * (time.perf_counter() - started))[::-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*inputs)
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), result.clone()


def say(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


if __name__ == "__main__":
    main()
