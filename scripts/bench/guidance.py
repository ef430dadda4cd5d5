"""How long the guidance's step takes in its forms: MVDream at full size, random weights, half precision, on a GPU.

    .venv/bin/python -m scripts.bench.guidance --scenes 1 4 --forms compiled fused

Forms: the models as diffusers has them, `compiled` (accelerate/unet.py and compiled.py) and `fused`
(accelerate/fused.py for the autoencoder, the rest compiled), which is what the service uses. Figures are medians of
replays of a CUDA graph, in ms; errors are those of the loss's gradient, against the first form that was asked for, as a
share of its largest value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from generation.accelerate.compiled import compile_autoencoder
from generation.accelerate.cuda_graph import GraphedFunction
from generation.accelerate.fused import fuse_encoder
from generation.accelerate.unet import compile_unet
from generation.generators.dreamgaussian.guidance.distillation import distil
from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from scripts.bench import full_size

# Operations of one scene's iteration over 700 TFLOP/s, the rate that large products reach on an H100. In ms.
FLOORS_MS = {"UNet": 1.9, "encoder, forward and backward": 3.0}
REPLAYS = 20
FORMS = ("plain", "compiled", "fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--scenes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--kernels", type=int, default=0, help="name so many kernels that take longest")
    args = parser.parse_args()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    reference: dict[int, Tensor] = {}
    for form in args.forms:
        torch._dynamo.reset()
        guidance = full_size.mvdream("cuda")
        if form == "fused":
            fuse_encoder(guidance._vae)
        if form != "plain":
            compile_unet(guidance._unet)
            compile_autoencoder(guidance._vae)
        for scenes in args.scenes:
            started = time.perf_counter()
            error = measure(guidance, scenes, form, reference, args.kernels)
            say(f"{form}, {scenes} scene(s): error {error:.1e}; all this took {time.perf_counter() - started:.0f} s")


def measure(guidance: MVDream, scenes: int, form: str, reference: dict[int, Tensor], kernels: int) -> float:
    """Prints the figures; returns the error of the gradient, and keeps it as the reference where there is none."""
    for part, graph in capture_parts(guidance, scenes).items():
        ms = replayed_ms(graph)
        floor = FLOORS_MS[part] * scenes
        say(f"{form}, {scenes} scene(s), {part}: {ms:.2f} ms, {ms / floor:.1f} times its floor")
        for name, (count, us) in slowest(graph, kernels).items():
            say(f"    {us / 1e3:.2f} ms in {count} of {name[:110]}")
    inputs = step_inputs(guidance, scenes)
    gradient = guidance._distil(*inputs, scale=50.0)[1]
    expected = reference.setdefault(scenes, gradient)
    return float((gradient - expected).abs().max() / expected.abs().max())


def step_inputs(guidance: MVDream, scenes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `Distillation._distil` takes before the scale, random but the same every time."""
    generator = torch.Generator().manual_seed(0)
    views = guidance.views * scenes
    tensors = (
        torch.rand(views, 3, guidance.image_size, guidance.image_size, generator=generator),
        torch.eye(4).repeat(views, 1, 1),
        guidance.prepare("", "").repeat(scenes, 1, 1, 1),
        torch.full((scenes,), 500),
        torch.randn(views, *guidance._latent_shape, generator=generator),
    )
    images, poses, words, t, noise = (tensor.to(guidance._unet.device) for tensor in tensors)
    return images, poses, words, t, noise


def capture_parts(guidance: MVDream, scenes: int) -> dict[str, Any]:
    """CUDA graphs of the step's parts, for so many scenes."""
    images, poses, words, t, noise = step_inputs(guidance, scenes)

    def unet(latents: Tensor, t: Tensor, poses: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (guidance._guided_noise(latents, t, poses, words, 50.0),)

    def encoder(images: Tensor, latents: Tensor) -> tuple[Tensor, ...]:
        return distil(images, guidance._latents, lambda _: latents, scenes)

    steps = t.repeat_interleave(guidance.views)
    return {
        "UNet": capture(unet, noise.to(guidance._unet.dtype), steps, poses, words),
        "encoder, forward and backward": capture(encoder, images, noise),
    }


def capture(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Any:
    captured = GraphedFunction(function)
    captured.capture(*inputs)
    (graph,) = captured._graphs.values()
    return graph


def replayed_ms(graph: Any) -> float:
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def slowest(graph: Any, count: int) -> dict[str, tuple[int, float]]:
    """The kernels of one replay that take longest: how often they run, and for how many microseconds in all."""
    if not count:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.graph.replay()
        torch.cuda.synchronize()
    runs: Counter[str] = Counter()
    us: Counter[str] = Counter()
    for event in profile.events():
        runs[event.name] += 1
        us[event.name] += event.device_time
    return {name: (runs[name], total) for name, total in us.most_common(count)}


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
