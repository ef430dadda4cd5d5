"""How long views take to be drawn: ImageDream, or MVDream from words, at full size, random weights, half precision.

    .venv/bin/python -m scripts.bench.views                       on a GPU
    .venv/bin/python -m scripts.bench.views --tiny                on a CPU, small: does it run at all?

For each number of objects at once: beginning (pictures seen, words known), one denoising step, the way to images, and
all of it, in ms. First as diffusers and PyTorch have it, then compiled and captured in CUDA graphs, with how far the
latents after the same steps are from the first form's, as a share of their deviation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generation.generators.multiview import ImageDream, MVDreamViews
from generation.generators.multiview.base import MultiViewModel

KINDS = ("imagedream", "mvdream")
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--objects", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true", help="small models, on a CPU")
    parser.add_argument("--json", type=Path, help="write all figures there, as they come")
    args = parser.parse_args()
    say(f"{'CPU' if args.tiny else torch.cuda.get_device_name()}, torch {torch.__version__}")
    figures: dict[str, Any] = {}
    for kind in args.kinds:
        if not args.tiny:
            torch._dynamo.reset()
            torch.cuda.reset_peak_memory_stats()
        multiview = small(kind, args.steps) if args.tiny else full(kind, args.steps)
        expected: dict[int, Tensor] = {}
        for form in ("eager", "captured"):
            if form == "captured":
                started = time.perf_counter()
                multiview.warm_up(max(args.objects), say)
                say(f"{kind}: warmed up in {time.perf_counter() - started:.0f} s")
            for count in args.objects:
                found, latents = measure(multiview, count, args.steps)
                before = expected.setdefault(count, latents)
                found["apart"] = float((latents - before).abs().max() / before.std())
                figures[f"{kind}, {form}, {count}"] = found
                shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items() if name != "apart")
                say(f"{kind}, {form}, {count} at once: {shown} ms; {found['apart']:.1e} from the eager form")
                if args.json:
                    args.json.write_text(json.dumps(figures, indent=1))
        if not args.tiny:
            figures[f"{kind}, peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
            say(f"{kind}: peak of GPU memory {figures[f'{kind}, peak GiB']:.1f} GiB in tensors")
        del multiview
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def full(kind: str, steps: int) -> MultiViewModel:
    from scripts.bench import full_size

    make = full_size.imagedream if kind == "imagedream" else full_size.mvdream_views
    multiview: MultiViewModel = make("cuda", steps=steps)
    return multiview


def small(kind: str, steps: int) -> MultiViewModel:
    tiny = Path(__file__).resolve().parents[2] / "generation" / "weights" / "tiny"
    if kind == "mvdream":
        return MVDreamViews.load(tiny / "mvdream", "cpu", torch.float32, steps=steps)
    import tempfile

    from safetensors.torch import save_file

    from scripts.tools import small_imagedream
    from scripts.tools.golden_weights import golden

    about = golden("imagedream_views")[1]
    with tempfile.TemporaryDirectory() as name:
        folder = small_imagedream.write(Path(name), about["config"]["context_dim"])
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text(json.dumps(about["config"]))
        state = small_imagedream.unet_weights(about["shapes"])
        save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
        return ImageDream.load(folder, "cpu", torch.float32, steps=steps)


@torch.no_grad()
def measure(multiview: MultiViewModel, count: int, steps: int) -> tuple[dict[str, float], Tensor]:
    """Milliseconds, medians, and the latents after two steps."""
    generator = torch.Generator().manual_seed(0)
    cutouts = [torch.rand(4, multiview.image_size, multiview.image_size, generator=generator) for _ in range(count)]
    device = multiview._cameras.device
    cutouts = [cutout.to(device) for cutout in cutouts]
    words, seeds = [""] * count, list(range(count))
    found = {"begin": timed(lambda: multiview.begin(words, cutouts, seeds))}
    samplings = multiview.begin(words, cutouts, seeds)
    for _ in range(2):
        multiview.step(samplings)
    latents = torch.stack([sampling.latents for sampling in samplings]).float()
    others = multiview.begin(words, cutouts, seeds)

    def step() -> None:
        for sampling in others:
            sampling.at = 1  # to be measured it is never done
        multiview.step(others)

    found["step"] = timed(step)
    found["images"] = timed(lambda: multiview.views(samplings))

    def all_of_it() -> None:
        samplings = multiview.begin(words, cutouts, seeds)
        for _ in range(steps):
            multiview.step(samplings)
        multiview.views(samplings)

    found["all"] = timed(all_of_it, repeats=1)
    return found, latents


def timed(call: Callable[[], object], repeats: int = REPEATS) -> float:
    call()
    times = []
    for _ in range(repeats):
        synchronise()
        started = time.perf_counter()
        call()
        synchronise()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
