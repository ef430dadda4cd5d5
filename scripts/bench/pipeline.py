"""How long the pipeline takes on this machine, and where the time goes: all in one run, as ratios to its eager form.

    .venv/bin/python -m scripts.bench.pipeline             the profile that the service would choose
    .venv/bin/python -m scripts.bench.pipeline --random    full size, random weights (scripts/bench/full_size.py)

Cases: the default config one request after the other, the same with four in flight (one joins when one ends), and the
ultra-fast config; with --pictures also pictures, and texts and pictures together, by the two generators of the profile.
Figures are seconds per request, the median where requests run alone; everything is warm.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from generation.generators.base import Subject
from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from generation.generators.dreamgaussian.optimiser import DreamGaussian
from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.kinds import load_options
from generation.generators.trellis.generator import Trellis
from generation.pipeline import assemble
from generation.pipeline.pipeline import Asset, Job, Pipeline, Request
from generation.pipeline.warm_up import warm_up
from generation.settings import CONFIGS, Settings
from scripts.bench.guidance import FLOORS_MS, capture_parts, replayed_ms

PROMPTS = ("a red cube", "a wooden chair", "a green boat", "a stone tower", "a blue vase", "a brass lamp")
NUMBERS = itertools.count()
ULTRA_STEPS = 2  # of FLUX


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="full size with random weights, on a GPU")
    parser.add_argument("--profile", default="auto")
    parser.add_argument("--config", type=Path, help="in place of the profile's; where it draws pictures, for them too")
    parser.add_argument("--models", type=Path, help="a models file in place of the profile's")
    parser.add_argument("--requests", type=int, default=3, help="of each case; twice as many with several in flight")
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--no-eager", action="store_true", help="leave the slow form out")
    parser.add_argument("--pictures", action="store_true", help="pictures too, alone and together with texts")
    parser.add_argument("--memory-gib", type=float, help="let the allocator have no more, and choose the class by it")
    parser.add_argument("--json", type=Path, help="write all figures there, as they come")
    args = parser.parse_args()

    if args.memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_gib * 2**30 / total)
    started = time.perf_counter()
    pipeline, settings = load(args)
    say(
        f"{device_name(settings.device)}, torch {torch.__version__}, {os.cpu_count()} CPU cores; "
        f"config {settings.config.name}"
    )
    say(f"models ready after {time.perf_counter() - started:.1f} s")
    say(f"memory: {settings.memory_reason}")
    figures: dict[str, Any] = {"device": device_name(settings.device), "config": settings.config.name}
    is_dreamgaussian = isinstance(pipeline.text, DreamGaussian)
    if not args.no_eager:
        first = pipeline
        if is_dreamgaussian:
            first = with_options(pipeline, sculptor(pipeline)._options.model_copy(update={"iters": 5}))
        one_by_one(first, 1)
        figures["eager"] = one_by_one(pipeline, 1)
        write(args, figures)
        show("eager, one request", figures["eager"])
    started = time.perf_counter()
    with assemble.enough_memory(settings):
        warm_up(pipeline, say)
    figures["warm_up_s"] = time.perf_counter() - started
    most = min(args.in_flight, pipeline.limit.maximum)
    say(f"warmed up in {figures['warm_up_s']:.1f} s, for {most} at once")
    reset_peak()
    figures["one"] = one_by_one(pipeline, args.requests)
    show("one request", figures["one"], figures.get("eager"))
    write(args, figures)
    figures["several"] = in_flight(pipeline, 2 * args.requests + 2, most)
    show(f"{most} in flight", figures["several"], figures.get("eager"))
    write(args, figures)
    if args.pictures:
        figures["picture"] = one_by_one(pipeline, args.requests, picture)
        show("one picture", figures["picture"])
        figures["mixed"] = in_flight(
            pipeline, 2 * args.requests + 2, most, lambda: (request, picture)[next(NUMBERS) % 2]()
        )
        show(f"texts and pictures, {most} in flight", figures["mixed"])
        write(args, figures)
    if is_dreamgaussian:
        figures["ultra"] = one_by_one(ultra_fast(pipeline), args.requests)
        show("ultra-fast, one request", figures["ultra"])
    if settings.device.startswith("cuda"):
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        say(f"peak of GPU memory: {figures['peak_gib']:.1f} GiB in tensors, {figures['reserved_gib']:.1f} reserved")
        say(f"at once by the end: {pipeline.limit.current} of {pipeline.limit.maximum}")
        write(args, figures)
    if settings.device.startswith("cuda") and is_dreamgaussian:
        figures["neighbours"] = neighbours(pipeline, most)
        figures["parts_ms"] = {n: parts(pipeline, n) for n in sorted({1, most})}
    if isinstance(pipeline.text, Trellis):
        figures["parts_ms"] = {n: trellis_parts(pipeline.text, n) for n in sorted({1, most})}
    write(args, figures)


def write(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def load(args: argparse.Namespace) -> tuple[Pipeline, Settings]:
    """A pipeline that is not warmed up, and its settings."""
    if not args.random:
        memory = int(args.memory_gib * 2**30) if args.memory_gib else None
        chosen = {name: path for name in ("config", "models") if (path := getattr(args, name)) is not None}
        if args.config and load_options(args.config).draws:
            chosen["image_config"] = args.config
        settings = Settings.resolve({"profile": args.profile, **chosen}, memory)
        return assemble.load(settings, say, warm=False), settings
    from scripts.bench import full_size

    settings = full_size.settings(memory=int(args.memory_gib * 2**30) if args.memory_gib else None, config=args.config)
    return full_size.load(settings, say, warm=False), settings


def with_options(pipeline: Pipeline, options: DreamGaussianOptions) -> Pipeline:
    """The same models under another config for texts."""
    other: Any = copy.copy(pipeline)
    of_texts = sculptor(pipeline)
    other.text = DreamGaussian(
        of_texts._guidance, options, of_texts._device, of_texts._remove_background, of_texts._image_guidance
    )
    result: Pipeline = other
    return result


def sculptor(pipeline: Pipeline) -> DreamGaussian:
    """The generator for texts. Raises SystemExit where that is another kind, whose parts are not known here."""
    if not isinstance(pipeline.text, DreamGaussian):
        raise SystemExit(f"measures dreamgaussian, not {pipeline.text.name}")
    return pipeline.text


def ultra_fast(pipeline: Pipeline) -> Pipeline:
    """The same models under the ultra-fast config, with fewer steps of FLUX."""
    kind = "tiny" if sculptor(pipeline)._options.init == "views" else "text"
    fast = with_options(pipeline, DreamGaussianOptions.load(CONFIGS / f"{kind}_mv_ultra_fast.yaml"))
    draws = pipeline.text_to_image
    assert draws is not None
    fast.text_to_image = fewer = copy.copy(draws)
    steps = min(ULTRA_STEPS, draws._options.steps)
    fewer._options = draws._options.model_copy(update={"steps": steps})
    return fast


def request() -> Request:
    """One like no other: prompts that were seen before are not encoded again."""
    number = next(NUMBERS)
    return Request(prompt=f"{PROMPTS[number % len(PROMPTS)]}, number {number}", seed=number, threshold=0.0)


def picture() -> Request:
    disc = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(disc).ellipse((128, 128, 384, 384), "red")
    return Request(image=disc, seed=next(NUMBERS), threshold=0.0)


def one_by_one(pipeline: Pipeline, count: int, make: Callable[[], Request] = request) -> dict[str, Any]:
    seconds, reports = [], []
    for _ in range(count):
        started = time.perf_counter()
        (outcome,) = pipeline.generate([make()])
        synchronise()
        seconds.append(time.perf_counter() - started)
        reports.append(report(outcome))
    return {"s": statistics.median(seconds), "all_s": seconds, **summary(reports)}


def in_flight(pipeline: Pipeline, count: int, most: int, make: Callable[[], Request] = request) -> dict[str, Any]:
    """`count` requests, `most` at once, as the engine runs them: the next joins when one is done."""
    waiting = [pipeline.begin(make()) for _ in range(count)]
    running: list[Job] = []
    reports = []
    started = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
        pipeline.tick(running)
        reports += [report(job.outcome) for job in running if job.outcome is not None]
        running = [job for job in running if job.outcome is None]
    synchronise()
    elapsed = time.perf_counter() - started
    return {
        "s": elapsed / count,
        "requests": count,
        "elapsed_s": elapsed,
        "per_hour": 3600 * count / elapsed,
        **summary(reports),
    }


def report(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, Asset)
    return outcome.report


def summary(reports: list[Any]) -> dict[str, Any]:
    names = dict.fromkeys(stage for r in reports for stage in r.seconds)
    stages = {name: statistics.median(r.seconds[name] for r in reports if name in r.seconds) for name in names}
    return {
        "stages_s": stages,
        "gaussians": [r.num_gaussians for r in reports],
        "rejected": [r.rejected for r in reports],
    }


def show(name: str, case: dict[str, Any], eager: dict[str, Any] | None = None) -> None:
    ratio = f", {eager['s'] / case['s']:.1f} times as fast as eager" if eager else ""
    hour = f", {case['per_hour']:.0f} an hour" if "per_hour" in case else ""
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in case["stages_s"].items())
    low, high = min(case["gaussians"]), max(case["gaussians"])
    say(f"{name}: {case['s']:.2f} s a request{hour}{ratio} ({stages}); {low} to {high} Gaussians")
    for reason in set(case["rejected"]) - {None}:
        say(f"  rejected: {reason}")


def neighbours(pipeline: Pipeline, scenes: int) -> dict[str, float]:
    """How far a scene among others is from the same one alone after one step: the share of values that differ by more
    than 0.001, by field. The first step of Adam is as long for the smallest gradient as for the largest."""
    dg = sculptor(pipeline)
    assert dg.cutout is not None
    size = dg.cutout.size
    cutout = torch.rand(4, size, size, generator=torch.Generator().manual_seed(0))
    alone, *among = (dg.begin(Subject("a red cube", cutout, seed)) for seed in (0, *range(scenes)))
    dg.tick([alone])
    dg.tick(among)
    pairs = zip(alone.gaussians().tensors().items(), among[0].gaussians().tensors().values(), strict=True)
    shares = {name: float(((a - b).abs() > 1e-3).float().mean()) for (name, a), b in pairs}
    say(f"alone and among {scenes - 1} others, values that differ by over 0.001 after a step: {shares}")
    return shares


def parts(pipeline: Pipeline, scenes: int) -> dict[str, float]:
    """Milliseconds of one iteration of so many scenes, by part; on a GPU, in the middle of their optimisation."""
    dg = sculptor(pipeline)
    guidance, options = dg._guidance, dg._options
    cutout = torch.rand(4, options.ref_size, options.ref_size, device=pipeline.device)
    cutout[3] = 1.0
    started = [dg.begin(Subject("a red cube", cutout, seed)) for seed in range(scenes)]
    for _ in range(options.iters // 2):
        dg.tick(started)
    synchronise()
    wall, cpu = [], []
    for _ in range(20):
        begin = time.perf_counter()
        dg.tick(started)
        cpu.append(1e3 * (time.perf_counter() - begin))
        synchronise()
        wall.append(1e3 * (time.perf_counter() - begin))
    assert isinstance(guidance, MVDream)
    graphs = capture_parts(guidance, scenes)
    result = {part: replayed_ms(graph) for part, graph in graphs.items()}
    guided = sum(result.values())
    result["iteration"] = statistics.median(wall)
    result["iteration, CPU alone"] = statistics.median(cpu)
    result["rest"] = result["iteration"] - guided
    for part, ms in result.items():
        floor = FLOORS_MS.get(part, 0) * scenes
        say(f"  {scenes} scene(s), {part}: {ms:.1f} ms" + (f", {ms / floor:.1f} times its floor" if floor else ""))
    return result


def trellis_parts(trellis: Trellis, works: int) -> dict[str, float]:
    """Milliseconds of each kind of tick of so many works together; with it, what is done before or after its step."""
    assert trellis.cutout is not None
    size = trellis.cutout.size
    cutouts = torch.rand(works, 4, size, size, device=trellis._device)
    running = [trellis.begin(Subject("", cutout, seed)) for seed, cutout in enumerate(cutouts)]
    ticks: dict[str, list[float]] = {}
    while not all(work.done for work in running):
        first, flow = running[0], "structure" if running[0].latents is None else "latents"
        steps = trellis._structure_steps if flow == "structure" else trellis._slat_steps
        name = f"{flow}, {'guided' if steps[first.step].guided else 'unguided'} step"
        if first.step in (0, len(steps) - 1):
            name = f"{flow}, {'first' if first.step == 0 else 'last'} tick"
        synchronise()
        begin = time.perf_counter()
        trellis.tick(running)
        synchronise()
        ticks.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
        if flow == "structure" and first.voxels is not None:
            counts = [(len(w.voxels.fine.coords), len(w.voxels.coarse.coords)) for w in running if w.voxels]
            say(f"  {works} at once: voxels, and what is left of them by eight: {counts}")
    result = {name: statistics.median(ms) for name, ms in ticks.items()}
    for name, ms in result.items():
        say(f"  {works} at once, {name}: {ms:.1f} ms ({len(ticks[name])} of them)")
    return result


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
