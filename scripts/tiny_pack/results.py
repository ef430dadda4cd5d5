"""Real results of the pack, good and bad ones, with the views that validators see: what the quality net learns from.

The pack's own chain (text to image, matting, DreamGaussian) runs for many prompts, each in several ways: the profile's
two configs, and worse ones of fewer sampling steps, fewer iterations, fewer points or too large steps.

    python -m scripts.tiny_pack.results --work FOLDER [--minutes M] [--workers N]    # writes FOLDER/results/*.pt
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.splats.gaussians import Gaussians
from generation.stages.self_check import fit_to_frame

from . import flaws, judge
from .captions import HELD_OUT, ObjectSpec, caption, sample_spec
from .shapes import COLOURS, SHAPES

SIZE = 112  # pixels that the quality net sees
RENDERED = 518  # pixels that validators render


@dataclass(frozen=True)
class Way:
    """How a result is made: the config, what differs from it, and after which iterations it is looked at."""

    config: str
    iterations: tuple[int, ...]
    options: dict[str, Any]


WAYS = {
    "ultra fast": Way("tiny_mv_ultra_fast", (40,), {}),
    "views alone": Way("tiny_mv_ultra_fast", (0, 40), {"init_views_steps": 20, "lambda_sd": 0.0}),
    "few steps": Way("tiny_mv_ultra_fast", (0, 40), {"init_views_steps": 4, "lambda_sd": 0.0}),
    "rough": Way(
        "tiny_mv_fast",
        (20, 60),
        {"init_views_steps": 8, "lambda_sd": 0.0, "num_pts": 7000, "position_lr_init": 0.004},
    ),
    "fast": Way("tiny_mv_fast", (100,), {}),
}
#: of the profile itself, when their iterations are done
OWN = {("fast", 100), ("ultra fast", 40)}


def _unseen_shapes(count: int = 6) -> tuple[str, ...]:
    return tuple(sorted(sorted(SHAPES, key=lambda s: hashlib.sha256(s.encode()).hexdigest())[:count]))


#: shapes that the quality net never sees in training
UNSEEN = _unseen_shapes()


def training_spec(rng: random.Random) -> ObjectSpec:
    """A random object of the shapes that training may see."""
    while True:
        spec = sample_spec(rng)
        if not {spec.shape, spec.base} & set(UNSEEN):
            return spec


def test_specs(each: int = 8) -> list[ObjectSpec]:
    """Objects of the unseen shapes, as many colours of each, those that no model of the pack has seen first."""
    specs = []
    for shape in UNSEEN:
        colours = sorted(COLOURS, key=lambda colour: ((shape, colour) not in HELD_OUT, colour))
        specs += [ObjectSpec(shape, colour) for colour in colours[:each]]
    return specs


@torch.no_grad()
def views(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    """What the net sees of a splat: bytes (16, 3, S, S) on white, and alphas (16, 1, S, S), also bytes."""
    rgb, alpha = flaws.drawn(gaussians, RENDERED)
    return smaller((rgb * 255).floor() / 255), smaller(alpha)


def smaller(images: Tensor) -> Tensor:
    """At the net's size, as the self-check does it, in bytes."""
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def planted(
    gaussians: Gaussians, wanted: list[tuple[str, float]], rng: random.Random, partner: Gaussians | None
) -> list[dict[str, Any]]:
    """Records of the splat with one flaw each."""
    records = []
    for kind, strength in wanted:
        if (result := flaws.plant(gaussians, kind, strength, rng, partner)) is not None:
            rgb, alpha = views(fit_to_frame(result[0]))
            flaw = {"kind": kind, "strength": strength, "shares": result[1].cpu()}
            records.append({"views": rgb.cpu(), "alpha": alpha.cpu(), "flaw": flaw})
    return records


def wanted_flaws(split: str, rng: random.Random) -> list[tuple[str, float]]:
    """For a test all kinds, the strengths by chance; for training two of them."""
    pairs = [(kind, rng.choice(flaws.STRENGTHS)) for kind in flaws.KINDS]
    return pairs if split == "test" else rng.sample(pairs, 2)


def batches(train: int, test: int, size: int, seed: int) -> list[dict[str, Any]]:
    """What to make: each a way and some objects with a seed each.

    An object's ways follow each other, and tests lie evenly among the others, so that a part of it is of use, too.
    """
    rng = random.Random(seed)
    tests = test_specs()
    rng.shuffle(tests)
    placed: list[tuple[float, dict[str, Any]]] = []
    for split, specs in (("test", tests[:test]), ("train", [training_spec(rng) for _ in range(train)])):
        for start in range(0, len(specs), size):
            group = list(enumerate(specs))[start : start + size]
            for way in WAYS:
                jobs = [{"object": f"{split} {i}", "spec": spec, "seed": rng.randrange(2**31)} for i, spec in group]
                placed.append((start / len(specs), {"split": split, "way": way, "jobs": jobs}))
    return [batch for _, batch in sorted(placed, key=lambda item: item[0])]


class Maker:
    """The pack's stages on one device."""

    def __init__(self, device: str) -> None:
        from generation.pipeline import assemble
        from generation.settings import Settings

        self.device = device
        settings = Settings.resolve({"profile": "tiny"})
        self.pipeline = assemble.load(settings, warm=False)
        self.judge = judge.load().to(device)
        self._before: Gaussians | None = None  # the result before, whose back another one may get

    def make(self, batch: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
        """The batch's results and, of some, the same with flaws."""
        from generation.generators.base import Subject
        from generation.generators.dreamgaussian.optimiser import DreamGaussian
        from generation.generators.dreamgaussian.options import DreamGaussianOptions
        from generation.settings import CONFIGS
        from generation.stages.background import recentre

        pipe: Any
        pipe, way = self.pipeline, WAYS[batch["way"]]
        options = DreamGaussianOptions.load(CONFIGS / f"{way.config}.yaml").model_copy(update=way.options)
        optimiser = DreamGaussian(pipe._text._guidance, options, self.device, pipe._background.remove)
        prompts = [caption(job["spec"], rng, plain=True) for job in batch["jobs"]]
        seeds = [job["seed"] for job in batch["jobs"]]
        images = torch.stack(list(pipe._text_to_image.generate(prompts, seeds)))
        with torch.no_grad():
            alphas = pipe._background.remove(images)
        scenes = []
        for job, prompt, image, alpha in zip(batch["jobs"], prompts, images, alphas, strict=True):
            try:
                cutout = recentre(image, alpha, options.ref_size)
                scenes.append((job, optimiser.begin(Subject(prompt, cutout, job["seed"]))))
            except Exception as error:  # nothing in the picture
                print(f"{prompt}: {error}", flush=True)
        made: list[dict[str, Any]] = []
        for iteration in range(max(way.iterations) + 1):
            if iteration in way.iterations:
                done = [fit_to_frame(scene.gaussians().detach()) for _, scene in scenes]
                for (job, _), splat in zip(scenes, done, strict=True):
                    rgb, alpha = views(splat)
                    about = {**job, "split": batch["split"], "way": batch["way"], "iteration": iteration}
                    about["spec"] = asdict(job["spec"])
                    named = self.judge.name(F.interpolate(rgb[:15:2].float() / 255, size=judge.SIZE, mode="area"))
                    about["named"] = named == (job["spec"].shape, job["spec"].colour)
                    result = {**about, "views": rgb.cpu(), "alpha": alpha.cpu(), "flaw": None}
                    made.append(result)
                    if (batch["way"], iteration) in OWN:
                        for record in planted(splat, wanted_flaws(batch["split"], rng), rng, self._before):
                            made.append({**about, **record})
                        self._before = Gaussians(**{name: value.clone() for name, value in splat.tensors().items()})
            if iteration < max(way.iterations) and scenes:
                optimiser.tick([scene for _, scene in scenes])
        return made


def work(rank: int, workers: int, todo: list[dict[str, Any]], folder: Path, device: str, until: float) -> None:
    """One process: every `workers`-th batch while there is time."""
    torch.set_num_threads(2)
    maker = Maker(device)
    for number in range(rank, len(todo), workers):
        if time.time() > until:
            break
        began = time.monotonic()
        if (folder / f"{number}.pt").exists():
            continue  # of a run before
        try:
            made = maker.make(todo[number], random.Random(number))
        except Exception as error:
            print(f"batch {number} ({todo[number]['way']}) failed: {error!r}", flush=True)
            continue
        torch.save(made, folder / f"{number}.tmp")
        (folder / f"{number}.tmp").replace(folder / f"{number}.pt")
        print(f"batch {number}/{len(todo)}: {len(made)} records, {time.monotonic() - began:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/tiny_pack"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--train", type=int, default=150, help="objects for training")
    parser.add_argument("--test", type=int, default=48, help="objects of unseen shapes")
    parser.add_argument("--batch", type=int, default=12, help="objects that are made together (1 on a CPU)")
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()
    folder = args.work / "results"
    folder.mkdir(parents=True, exist_ok=True)
    todo = batches(args.train, args.test, args.batch, args.seed)
    until = time.time() + args.minutes * 60
    if args.workers == 1:
        work(0, 1, todo, folder, args.device, until)
    else:
        torch.multiprocessing.start_processes(
            work, (args.workers, todo, folder, args.device, until), args.workers, start_method="spawn"
        )


if __name__ == "__main__":
    main()
