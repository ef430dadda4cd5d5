"""Results of the pack, good and bad ones, with the views that validators see: what the quality net learns from.

Tests and calibration are the pack's own chain (text to image, matting, then LGM or DreamGaussian) for objects of shapes
that training never saw, each in several ways: the profile's configs, and worse ones of fewer sampling steps,
iterations or points, too large steps, or views drawn from the words or the picture alone. Training has these for its
own shapes, with options drawn at random; results that begin with exact views of any object, noised and drawn anew from
there, or bent; and exact splats. Flaws are planted.

    python -m scripts.tiny_pack.results --work FOLDER [--minutes M] [--workers N]    # writes FOLDER/results/*.pt
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from generation.generators.base import Subject
from generation.generators.dreamgaussian.optimiser import GREY, RINGS, SAMPLE_GUIDANCE, DreamGaussian, foreground
from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.lgm.network import LGM, to_gaussians
from generation.generators.multiview.sampling import Sampler, Schedule
from generation.settings import CONFIGS, Settings
from generation.splats.cameras import Cameras, orbit
from generation.splats.gaussians import Gaussians
from generation.stages.background import NothingInImage, recentre
from generation.stages.self_check import VIEWS, fit_to_frame

from . import flaws, judge, train_lgm
from .captions import HELD_OUT, ObjectSpec, caption, sample_spec
from .compositions import composition
from .data import over_backdrop
from .distances import compared, distance
from .exact import AZIMUTHS, SIZE, Wanted, exact_objects, exact_views, framed, smaller
from .render import FRONT_ELEVATION, Objects, Renderer, composite
from .render import orbit as exact_orbit
from .shapes import COLOURS, SHAPES
from .training import PACK

RENDERED = 518  # pixels that validators render
KEPT = 8  # of the 16 views, for training


@dataclass(frozen=True)
class Pass:
    """How LGM's results are made: from views of so many denoising steps, by the words, the picture or both."""

    views_from: str = "picture_and_words"
    steps: int = train_lgm.STEPS
    guidance: float = train_lgm.GUIDANCE
    noise: float = 1.0  # of what the views are drawn from; under 1 they begin with exact ones; at 0 these are bent


@dataclass(frozen=True)
class Way:
    """How DreamGaussian's results are made: the config, what differs from it, and after which iterations."""

    config: str
    iterations: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    noise: float = 1.0  # of what the views are drawn from; under 1 they begin with exact ones


WAYS: dict[str, Way | Pass] = {
    "lgm": Pass(),
    "lgm in few steps": Pass(steps=3),
    "lgm of words": Pass("words"),
    "lgm of the picture": Pass("picture", guidance=2.0),
    "ultra fast": Way("tiny_mv_ultra_fast", (10, 40)),
}
#: of the profile itself, when its iterations are done
OWN = {("lgm", 0)}


def _by_hash() -> list[str]:
    return sorted(SHAPES, key=lambda s: hashlib.sha256(s.encode()).hexdigest())


#: shapes that the quality net never sees: those of its test, and those that its scores are calibrated on
UNSEEN = tuple(sorted(_by_hash()[:6]))
CALIBRATION = tuple(sorted(_by_hash()[6:10]))
SEEN = tuple(s for s in SHAPES if s not in UNSEEN + CALIBRATION)


def training_spec(rng: random.Random) -> ObjectSpec:
    """A random object of the shapes that training may see."""
    while True:
        spec = sample_spec(rng)
        if not {spec.shape, spec.base} & {*UNSEEN, *CALIBRATION}:
            return spec


def training_object(rng: random.Random) -> Wanted:
    """An object that a prompt of training can name, or more often one that none names."""
    return training_spec(rng) if rng.random() < 0.25 else composition(rng, SEEN)


def specs_of(shapes: tuple[str, ...], each: int) -> list[ObjectSpec]:
    """As many colours of each shape, those that no model of the pack has seen first."""
    specs = []
    for shape in shapes:
        colours = sorted(COLOURS, key=lambda colour: ((shape, colour) not in HELD_OUT, colour))
        specs += [ObjectSpec(shape, colour) for colour in colours[:each]]
    return specs


def random_way(rng: random.Random, edited: bool) -> Way:
    """Some way of training's by DreamGaussian: now and then a config's own, else with options drawn at random."""
    if not edited and rng.random() < 0.3:
        return Way("tiny_mv_ultra_fast", (rng.choice((10, 20)), 40))
    iterations = rng.choice((15, 30, 40, 60))
    options = {
        "init_views_steps": 12 if edited else rng.choice((3, 4, 6, 8, 10, 14)),
        "lambda_sd": 0.0,
        "num_pts": rng.choice((3000, 7000, 14000, 14000)),
        "position_lr_init": rng.choice((0.0004, 0.0004, 0.0015, 0.005)),
        "feature_lr": rng.choice((0.004, 0.004, 0.02)),
        "iters": iterations,
    }
    at = (0, rng.randrange(1, iterations), iterations) if rng.random() < 0.5 else (0, iterations)
    return Way("tiny_mv_ultra_fast", at, options, rng.uniform(0.1, 0.95) if edited else 1.0)


def random_passes(rng: random.Random, edited: bool) -> dict[str, Pass]:
    """Two or three of LGM's for training."""
    steps, guidance = rng.choice((2, 3, 4, 5, 6, 8)), rng.uniform(1.0, 4.0)
    if edited:
        passes = {
            "edited": Pass("picture", rng.choice((8, 12)), 1.0, rng.uniform(0.3, 0.98)),
            "anew": Pass("picture", steps, guidance, 0.999),  # from the exact picture alone
        }
        if rng.random() < 0.6:
            passes["bent"] = Pass(noise=0.0)
        return passes
    passes = {"lgm": Pass(steps=rng.choice((8, 12))), "lgm in few steps": Pass(steps=steps, guidance=guidance)}
    if rng.random() < 0.5:
        some = rng.choice(("words", "picture"))
        passes[f"lgm of {some}"] = Pass(some, rng.choice((4, 6, 8)), guidance)
    if rng.random() < 0.4:
        passes["bent"] = Pass(noise=0.0)
    return passes


@torch.no_grad()
def views(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    """What the net sees of a splat: bytes (16, 3, S, S) on white, and alphas (16, 1, S, S), also bytes."""
    rgb, alpha = flaws.drawn(gaussians, RENDERED)
    return smaller((rgb * 255).floor() / 255), smaller(alpha)


class Drawn(DreamGaussian):
    """Scenes whose views were drawn before, for many scenes at once."""

    drawn: Iterator[tuple[Tensor, Tensor, Cameras]]

    def _sample(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Cameras]:
        return next(self.drawn)


@torch.no_grad()
def draw_views(
    guidance: Any, conditions: Tensor, cameras: Cameras, latents: Tensor, steps: int, noise: float, exact: Tensor | None
) -> Tensor:
    """Images (S * V, 3, H, W) of S scenes by conditions (S, 2, L, C), from latents (S * V, ...), all pure noise.

    As `MVDream.sample` does it for one scene. `exact`: images as these, `noise` of whose steps are made anew.
    """
    scheduler, joint = guidance._scheduler, guidance._joint
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    scale = SAMPLE_GUIDANCE
    if exact is not None:
        times = times[min(round((1 - noise) * steps), steps - 1) :]
        parts = [guidance._latents(guidance._resize(part)) for part in exact.to(latents).split(64)]
        latents = scheduler.add_noise(torch.cat(parts), latents, times[:1].expand(len(latents)))
        scale = 1.0
    poses = cameras.camera_to_world.repeat(len(conditions), 1, 1)
    try:
        joint.views = len(cameras)
        for t in times:
            at = t.to(latents.device).repeat(2, len(latents))
            predicted = guidance._guided(latents.repeat(2, 1, 1, 1, 1), at, poses, conditions, scale)
            latents = scheduler.step(predicted, t, latents).prev_sample
    finally:
        joint.views = guidance.views
    images = [guidance._vae.decode(part / guidance._vae.config.scaling_factor).sample for part in latents.split(64)]
    return (torch.cat(images).float() / 2 + 0.5).clamp(0, 1)


class Maker:
    """The pack's stages on one device."""

    def __init__(self, device: str) -> None:
        from generation.pipeline import assemble

        self.device = device
        settings = Settings.resolve({"profile": "tiny", "config": CONFIGS / "tiny_mv_fast.yaml"})
        self.pipeline = assemble.load(settings.model_copy(update={"device": device}), warm=False)
        self.chain = train_lgm.Chain(PACK, device)
        self.lgm = LGM.load(PACK / "lgm", device, torch.float32)
        self.judge = judge.load().to(device)
        self._before: Gaussians | None = None  # the splat before, whose back another one may get

    def _guidance(self) -> Any:
        return self.pipeline.text._guidance  # type: ignore[attr-defined]

    def make(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Records of a batch's results, and of some the same with flaws."""
        rng = random.Random(batch["seed"])
        wanted: list[Wanted] = batch["wanted"]
        if batch["ways"] is None:
            return self._exact_splats(batch, rng)
        exact = self._exact(wanted, (0.0,) if batch["split"] == "train" else (0.0, 0.04))
        records: list[dict[str, Any]] = []
        for name, way in batch["ways"].items():
            results = self._passed if isinstance(way, Pass) else self._results
            for iteration, splats in results(way, wanted, rng):
                for i, splat in splats.items():
                    own = batch["split"] != "train" and (name, iteration) in OWN
                    records += self._seen(splat, self._about(batch, i, f"{name} {iteration}", own), exact, i, rng)
        return records

    def _about(self, batch: dict[str, Any], i: int, way: str, own: bool) -> dict[str, Any]:
        wanted: Wanted = batch["wanted"][i]
        return {
            "wanted": wanted,
            "object": f"{batch['split']} {batch['first'] + i}" if batch["split"] != "train" else f"{batch['seed']} {i}",
            "split": batch["split"],
            "way": way,
            "own": own,
            "spec": asdict(wanted) if isinstance(wanted, ObjectSpec) else None,
        }

    def _exact(self, wanted: list[Wanted], jitters: tuple[float, ...]) -> list[list[Tensor]]:
        """Of each object the validators' views of so many exemplars, as `compared` has them."""
        seen = []
        for jitter in jitters:
            objects, _ = framed(exact_objects(wanted, self.device, random.Random(0), jitter))
            rgb, alpha = exact_views(objects, AZIMUTHS.expand(len(wanted), VIEWS), SIZE)
            seen.append([compared(*each) for each in zip(rgb, alpha, strict=True)])
        return [list(each) for each in zip(*seen, strict=True)]

    @torch.no_grad()
    def _passed(
        self, way: Pass, wanted: list[Wanted], rng: random.Random
    ) -> Iterator[tuple[int, dict[int, Gaussians]]]:
        """LGM's splats in the validators' frame by the number of what was wanted."""
        prompts = [caption(w, rng, plain=True) if isinstance(w, ObjectSpec) else "" for w in wanted]
        seeds = [rng.randrange(2**31) for _ in wanted]
        cutouts, exact = None, None
        if way.noise < 1:
            objects, n = exact_objects(wanted, self.device, random.Random(0), 0.0), len(wanted)
            renderer, poses = Renderer(self.device), train_lgm.nominal(1, self.device)[0]
            rgba = [renderer.render(objects, pose.expand(n, 4, 4), train_lgm.CONFIG.input_size) for pose in poses]
            exact = over_backdrop(torch.stack(rgba, 1))
            cutouts = torch.cat([rgba[0][:, :3] / rgba[0][:, 3:].clamp_min(1e-3), rgba[0][:, 3:]], 1).clamp(0, 1)
        elif way.views_from != "words":
            cutouts = self.chain.picture(prompts, seeds)
        if exact is not None and way.noise == 0:
            views = train_lgm.disagree(exact.flatten(0, 1)).view_as(exact)
        else:
            texts = [""] * len(prompts) if way.views_from == "picture" else prompts
            views = self._views(way, texts, cutouts, seeds, exact)
        splats = [to_gaussians(each, self.lgm.config) for each in self.lgm(views, self.lgm.rays())]
        yield 0, {i: fit_to_frame(splat) for i, splat in enumerate(splats) if len(splat) >= 1000}

    def _views(
        self, way: Pass, texts: list[str], cutouts: Tensor | None, seeds: list[int], exact: Tensor | None
    ) -> Tensor:
        """Drawn views (N, V, 3, 64, 64), begun with `exact` ones where there are any."""
        multiview = self.chain.multiview_models[cutouts is not None]
        scheduler = DDIMScheduler.from_pretrained(PACK / "mvdream" / "scheduler", local_files_only=True)
        schedule = Schedule.of(scheduler, way.steps, self.device)
        sampler = Sampler(schedule, multiview._guided, multiview._sampler._frames)
        multiview._scale = way.guidance
        samplings = multiview.begin(texts, list(cutouts) if cutouts is not None else [None] * len(texts), seeds)
        start = 0
        if exact is not None:
            start = min(round((1 - way.noise) * way.steps), way.steps - 1)
            mean, _ = multiview._posterior(exact.flatten(0, 1))
            signal = schedule.signal[start]
            for sampling, latents in zip(samplings, mean.unflatten(0, exact.shape[:2]), strict=True):
                sampling.at = start
                sampling.latents = signal.sqrt() * latents + (1 - signal).sqrt() * sampling.latents
        for sampling in samplings:
            sampling.steps = way.steps
        for _ in range(start, way.steps):
            sampler.step(samplings)
        return multiview.views(samplings)

    def _results(
        self, way: Way, wanted: list[Wanted], rng: random.Random
    ) -> Iterator[tuple[int, dict[int, Gaussians]]]:
        """For each iteration asked for, splats in the validators' frame by the number of what was wanted."""
        pipe = self.pipeline
        options = DreamGaussianOptions.load(CONFIGS / f"{way.config}.yaml").model_copy(update=way.options)
        guidance = self._guidance()
        optimiser = Drawn(guidance, options, self.device, pipe.background.remove)
        prompts = [caption(w, rng, plain=True) if isinstance(w, ObjectSpec) else "" for w in wanted]
        seeds = [rng.randrange(2**31) for _ in wanted]
        size = guidance.image_size
        cameras = orbit(
            torch.tensor([e for e, _ in RINGS]).repeat_interleave(4),
            torch.cat([start + torch.tensor([0.0, 90, 180, 270]) for _, start in RINGS]),
            options.radius, options.fovy, size, size,
        ).to(self.device)  # fmt: skip
        behind = torch.tensor(GREY if options.background == "random" else options.background, device=self.device)
        behind = behind.view(3, 1, 1)
        exact = None
        if way.noise < 1:
            objects = exact_objects(wanted, self.device, random.Random(0), 0.0)
            cutouts, exact = self._exact_inputs(objects, cameras, behind, options.ref_size)
        else:
            cutouts = self._cutouts(prompts, seeds, options.ref_size)
        there = list(cutouts)
        sketches = {i: optimiser.prefetch(prompts[i], seeds[i]) for i in there}
        channels, side = guidance._unet.config.in_channels, guidance._unet.config.sample_size
        shape = (len(cameras), channels, side, side)
        latents = torch.cat([torch.randn(shape, generator=sketches[i].generator) for i in there]).to(self.device)
        conditions = torch.stack([sketches[i].condition for i in there])  # type: ignore[misc]
        chosen = None if exact is None else torch.cat([exact[i] for i in there])
        images = draw_views(guidance, conditions, cameras, latents, options.init_views_steps, way.noise, chosen)
        with torch.no_grad():
            alphas = torch.cat([pipe.background.remove(part) for part in images.split(64)])
        shown = foreground(images, alphas, behind)
        v = len(cameras)
        optimiser.drawn = iter([(shown[k : k + v], alphas[k : k + v], cameras) for k in range(0, len(shown), v)])
        # Without words a scene is begun as if it had some: its picture is not what the views were drawn from.
        scenes = {i: optimiser.begin(Subject(prompts[i] or "thing", cutouts[i], seeds[i], sketches[i])) for i in there}
        for iteration in range(max(way.iterations) + 1):
            if iteration in way.iterations:
                yield iteration, {i: fit_to_frame(scene.gaussians().detach()) for i, scene in scenes.items()}
            if iteration < max(way.iterations):
                optimiser.tick(list(scenes.values()))

    def _cutouts(self, prompts: list[str], seeds: list[int], size: int) -> dict[int, Tensor]:
        assert self.pipeline.text_to_image is not None
        images = torch.stack(list(self.pipeline.text_to_image.generate(prompts, seeds)))
        with torch.no_grad():
            alphas = self.pipeline.background.remove(images)
        cutouts = {}
        for i, (image, alpha) in enumerate(zip(images, alphas, strict=True)):
            try:
                cutouts[i] = recentre(image, alpha, size)
            except NothingInImage as nothing:
                print(f"{prompts[i]}: {nothing}", flush=True)
        return cutouts

    def _exact_inputs(
        self, objects: Objects, cameras: Cameras, behind: Tensor, size: int
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Cut-outs from the front, and exact views (N, V, 3, H, W) of what the guidance would draw."""
        renderer, n = Renderer(self.device), len(objects)
        front = exact_orbit(torch.full((n,), FRONT_ELEVATION), torch.zeros(n)).to(self.device)
        rgba = renderer.render(objects, front, size)
        cutouts = torch.cat([rgba[:, :3] / rgba[:, 3:].clamp_min(1e-3), rgba[:, 3:]], 1).clamp(0, 1)
        pixels = self._guidance().image_size
        exact = [
            composite(renderer.render(objects, c2w.expand(n, 4, 4), pixels), behind) for c2w in cameras.camera_to_world
        ]
        return dict(enumerate(cutouts)), torch.stack(exact, 1)

    def _seen(
        self, splat: Gaussians, about: dict[str, Any], exact: list[list[Tensor]], i: int, rng: random.Random
    ) -> list[dict[str, Any]]:
        """The record of a splat, and now and then (always of the profile's own in a test) the same with flaws."""
        rgb, alpha = views(splat)
        record = {**about, "flaw": None}
        mine = compared(rgb, alpha)
        far = [distance(mine, each).cpu() for each in exact[i]]
        record |= {"distances": far[0], "distance": float(far[0].mean()), "distance_again": float(far[-1].mean())}
        spec = about["spec"]
        if spec is not None:
            named = self.judge.name(F.interpolate(rgb[:15:2].float() / 255, size=judge.SIZE, mode="area"))
            record["named"] = named == (spec["shape"], spec["colour"])
        records = [self._kept(record, rgb, alpha)]
        if about["split"] == "train":
            if rng.random() < 0.35:
                records += self._any_flaws(splat, rgb, alpha, about, rng, 1)
        elif about["own"]:
            records += self._planted(splat, about, rng)
        self._before = Gaussians(**{name: value.clone() for name, value in splat.tensors().items()})
        return records

    def _kept(self, record: dict[str, Any], rgb: Tensor, alpha: Tensor) -> dict[str, Any]:
        """With the views: for training some of them, the same ones of an object in all its states."""
        if record["split"] != "train":
            return {**record, "views": rgb.cpu(), "alpha": alpha.cpu()}
        which = torch.randperm(VIEWS - 1, generator=torch.Generator().manual_seed(crc32(record["object"].encode())))[
            :KEPT
        ]
        record = {k: v[which] if k == "distances" else v for k, v in record.items()}
        if record["flaw"] is not None:
            record["flaw"] = {**record["flaw"], "shares": record["flaw"]["shares"][which]}
        which = which.to(rgb.device)
        return {**record, "views": rgb[which].cpu(), "alpha": alpha[which].cpu()}

    def _any_flaws(
        self, splat: Gaussians, rgb: Tensor, alpha: Tensor, about: dict[str, Any], rng: random.Random, count: int
    ) -> list[dict[str, Any]]:
        """For training: of any size, which is measured on what the net sees."""
        records = []
        for _ in range(count):
            flawed, kind = flaws.any_flaw(splat, rng, self._before)
            if len(flawed) < 100:
                continue
            seen, seen_alpha = views(fit_to_frame(flawed))
            shares = flaws.shares((rgb.float() / 255, alpha.float() / 255), views(flawed)[0].float() / 255)
            if float(shares.mean()) > 0.004:
                flaw = {"kind": kind, "strength": None, "shares": shares.cpu()}
                records.append(self._kept({**about, "flaw": flaw}, seen, seen_alpha))
        return records

    def _planted(self, splat: Gaussians, about: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
        """For tests: each kind in one of the three strengths."""
        records = []
        for kind in flaws.KINDS:
            strength = rng.choice(flaws.STRENGTHS)
            if (result := flaws.plant(splat, kind, strength, rng, self._before)) is not None:
                flaw = {"kind": kind, "strength": strength, "shares": result[1].cpu()}
                records.append(self._kept({**about, "flaw": flaw}, *views(fit_to_frame(result[0]))))
        return records

    def _exact_splats(self, batch: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
        """Splats of exact objects; for training worsened all over, and with flaws; for tests with flaws."""
        wanted, records = batch["wanted"], []
        objects, splats = framed(exact_objects(wanted, self.device, rng), exactly=True)
        rgb, alpha = exact_views(objects, AZIMUTHS.expand(len(wanted), VIEWS), SIZE)
        exact = [[compared(*each)] for each in zip(rgb, alpha, strict=True)]
        for i, splat in enumerate(map(fit_to_frame, splats)):
            about = self._about(batch, i, "exact", own=False)
            about["object"] = f"exact {about['object']}"
            rgb, alpha = views(splat)
            nothing = {"distances": torch.zeros(VIEWS), "distance": 0.0, "distance_again": 0.0}
            records.append(self._kept({**about, "flaw": None, **nothing}, rgb, alpha))
            if batch["split"] != "train":
                records += self._planted(splat, about, rng)
            else:
                records += self._any_flaws(splat, rgb, alpha, about, rng, 3)
                for k in range(3):
                    worse = flaws.degraded(splat, rng)
                    records += self._seen(fit_to_frame(worse), {**about, "way": f"worse {k}"}, exact, i, rng)
            self._before = splat
        return records


def unseen_batches(size: int, each: int) -> list[dict[str, Any]]:
    """The test's and calibration's batches: exact splats of the objects, and results in all ways."""
    out: list[dict[str, Any]] = []
    for ways in (WAYS, None):
        for split, shapes, colours in (("test", UNSEEN, each), ("calibration", CALIBRATION, (each * 3 + 3) // 4)):
            specs = specs_of(shapes, colours)
            random.Random(split).shuffle(specs)
            for start in range(0, len(specs), size):
                wanted: list[Wanted] = list(specs[start : start + size])
                out.append({"split": split, "first": start, "seed": len(out), "ways": ways, "wanted": wanted})
    return out


def training_batch(number: int, size: int, seed: int) -> dict[str, Any]:
    """By its number, from 0."""
    rng = random.Random(f"training {seed} {number}")
    common = {"split": "train", "first": 0, "seed": 1_000_000 * (1 + seed) + number}
    kind = ("edited", "words", "edited", "exact", "edited", "words", "edited")[number % 7]
    if kind == "exact":
        return {**common, "ways": None, "wanted": [training_object(rng) for _ in range(size)]}
    edited = kind == "edited"
    wanted = [training_object(rng) if edited else training_spec(rng) for _ in range(size)]
    ways: dict[str, Way | Pass] = dict(random_passes(rng, edited))
    if rng.random() < 0.3:
        ways[kind] = random_way(rng, edited)
    return {**common, "ways": ways, "wanted": wanted}


def work(rank: int, workers: int, args: argparse.Namespace, until: float) -> None:
    """One process: every `workers`-th batch while there is time."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.set_float32_matmul_precision("high")
    maker = Maker(args.device)
    print(f"worker {rank} ready", flush=True)
    folder = args.work / "results"
    first = [] if args.no_tests else unseen_batches(args.batch, args.test)
    number = rank
    while time.time() < until and number < (args.most or 10**6):
        began = time.monotonic()
        batch = first[number] if number < len(first) else training_batch(number - len(first), args.batch, args.seed)
        path = folder / f"{batch['split']}_{number}.pt"
        number += workers
        if path.exists():
            continue  # of a run before
        try:
            made = maker.make(batch)
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(f"batch {path.stem} failed: {error!r}", flush=True)
            continue
        torch.save(made, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        seconds = time.monotonic() - began
        print(f"batch {path.stem}: {len(made)} records, {seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/tiny_pack"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each worker")
    parser.add_argument("--seed", type=int, default=0, help="of the training objects: another one has others")
    parser.add_argument("--test", type=int, default=8, help="colours of each unseen shape")
    parser.add_argument("--no-tests", action="store_true", help="training alone")
    parser.add_argument("--most", type=int, help="batches")
    parser.add_argument("--batch", type=int, default=24, help="objects that are made together (1 on a CPU)")
    args = parser.parse_args()
    (args.work / "results").mkdir(parents=True, exist_ok=True)
    until = time.time() + args.minutes * 60
    if args.workers == 1:
        work(0, 1, args, until)
    else:
        torch.multiprocessing.start_processes(work, (args.workers, args, until), args.workers, start_method="spawn")


if __name__ == "__main__":
    main()
