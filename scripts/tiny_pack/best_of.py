"""Measure on the tiny pack what the best of 1, 2, 4 and 8 candidates gains, and what an early look would cost.

The final score chooses, so the chosen one's score is higher by construction. What it gains is said by referees that
choose nothing: the distance to the exact render of what was asked for, which needs no net; the judge, by the
log-probability that it gives shape and colour as they were asked for; and other quality nets (``referee.py``).
Prompts are the judge's 48 that training never saw, and objects on others, which the judge has no words for.

    python -m scripts.tiny_pack.best_of make FOLDER [--prompts 48] [--stacks 12] [--config configs/tiny_lgm.yaml]
    python -m scripts.tiny_pack.best_of tell FOLDER [--referee FILE ...] [--chooser FOLDER]

"make" writes a file for each prompt, and goes on where it was stopped. "tell" averages over all ways to draw N of the
8 candidates; intervals are of 95 %, by bootstrap over prompts. Early look: candidates are ranked by CLIP's cosine of
the drawn picture with the prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from generation.fleet.candidates import merit, seed_of
from generation.pipeline import assemble
from generation.pipeline.pipeline import Asset, Pipeline, Request
from generation.schema.score import final_score
from generation.settings import Settings
from generation.splats import ply
from generation.stages.self_check import VIEWS, Check, SelfCheck, fit_to_frame
from generation.stages.self_check.quality import QualityNet
from scripts.tiny_pack import judge, referee
from scripts.tiny_pack.captions import ObjectSpec, caption, evaluation_specs
from scripts.tiny_pack.distances import compared, distance
from scripts.tiny_pack.exact import AZIMUTHS, SIZE, exact_objects, exact_views, framed, smaller
from scripts.tiny_pack.flaws import drawn
from scripts.tiny_pack.measure_quality import logits, scores
from scripts.tiny_pack.shapes import COLOURS, SHAPES, STACK_BASES, STACK_TOPS

CANDIDATES = 8
COUNTS = (1, 2, 4, CANDIDATES)
SEED = 1000
THRESHOLD = 0.6  # the service's
RESAMPLES = 10_000
ALL_ROUND = slice(0, VIEWS - 1, 2)  # of the validators' views; the last one is the first

Table = NDArray[np.float64]  # (prompts, candidates)


def stacks(count: int) -> list[ObjectSpec]:
    """Objects on others."""
    rng = random.Random(SEED)
    specs = []
    for _ in range(count):
        colour, base_colour = rng.sample(list(COLOURS), 2)
        specs.append(ObjectSpec(rng.choice(STACK_TOPS), colour, "matte", "", rng.choice(STACK_BASES), base_colour))
    return specs


# Candidates.


@torch.no_grad()
def look(judging: judge.Judge, rgb: Tensor, spec: ObjectSpec) -> tuple[bool, float]:
    """Whether the judge names shape and colour as asked, and the log-probability that it gives both."""
    seen = F.interpolate(rgb[ALL_ROUND].float() / 255, size=judge.SIZE, mode="area")
    shape, colour = (each.log_softmax(1).mean(0) for each in judging(seen))
    right = list(SHAPES).index(spec.shape), list(COLOURS).index(spec.colour)
    return (int(shape.argmax()), int(colour.argmax())) == right, float(shape[right[0]] + colour[right[1]])


def exact_of(spec: ObjectSpec) -> Tensor:
    """Eight views all round the exact object, as ``distance`` compares them."""
    objects, _ = framed(exact_objects([spec], "cpu", random.Random(0), 0.0))
    rgb, alpha = exact_views(objects, AZIMUTHS[None, ALL_ROUND], SIZE)
    return compared(rgb[0], alpha[0])


class LastLook:
    """``views``: the validators' (16, 3, 168, 168), in bytes, of the splat that the self-check saw last."""

    def __init__(self, check: SelfCheck) -> None:
        self.views: Tensor | None = None
        self._check_all = check.check_all
        check.check_all = self  # type: ignore[method-assign, assignment]

    def __call__(self, splats: Any, fit: bool = False) -> list[Check]:
        checks = self._check_all(splats, fit)
        self.views = None if checks[-1].views is None else smaller(checks[-1].views)
        return checks


@torch.no_grad()
def make(
    pipeline: Pipeline, last: LastLook, judging: judge.Judge, spec: ObjectSpec, exact: Tensor, prompt: str, seed: int
) -> dict[str, Any]:
    """A candidate, and what is said of it; without a splat it has no views."""
    job = pipeline.begin(Request(prompt=prompt, seed=seed, threshold=0.0))
    while job.outcome is None:
        pipeline.tick([job])
    row: dict[str, Any] = {"seed": seed, "score": 0.0}
    if job.image is not None:
        clip = pipeline.self_check._text
        row["picture"] = float(clip.embed(job.image[None])[0].float() @ clip.encode([prompt])[0].float())
    if isinstance(job.outcome, Asset) and job.outcome.ply and last.views is not None:
        report = job.outcome.report
        row |= {"score": merit(report), "parts": report.parts, "views": last.views}
        rgb, alpha = drawn(fit_to_frame(ply.read(job.outcome.ply)), SIZE)
        seen = compared((rgb[ALL_ROUND] * 255).round(), (alpha[ALL_ROUND] * 255).round())
        row["distance"] = float(distance(seen, exact).mean())
        if not spec.base:
            row["named_right"], row["log_probability"] = look(judging, last.views, spec)
    return row


def make_all(args: argparse.Namespace) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    pipeline = assemble.load(Settings.resolve({"profile": "tiny", "config": args.config}), print, warm=False)
    last = LastLook(pipeline.self_check)
    judging = judge.load()
    rng = random.Random(0)
    # Mixed, so that a run that is stopped has some of both.
    specs = sorted(
        [*enumerate(evaluation_specs(args.prompts)), *enumerate(stacks(args.stacks))],
        key=lambda each: each[0] * (args.prompts / args.stacks if each[1].base else 1),
    )
    for number, spec in specs:
        path = args.folder / f"{'stack' if spec.base else 'prompt'}_{number:03d}.pt"
        prompt = caption(spec, rng, plain=True)
        if path.exists():
            continue
        threads = torch.get_num_threads()
        exact = exact_of(spec)
        torch.set_num_threads(threads)  # rendering it takes all cores from then on
        seeds = [seed_of(SEED, candidate) for candidate in range(CANDIDATES)]
        rows = [make(pipeline, last, judging, spec, exact, prompt, seed) for seed in seeds]
        torch.save({"prompt": prompt, "rows": rows}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        print(prompt, [round(row["score"], 3) for row in rows], flush=True)


# What they gain.


def gathered(made: list[dict[str, Any]], value: Any, worst: Any = min) -> Table:
    """Of each candidate what `value` gives; where there is nothing to look at, the worst of all."""
    found = [[value(row) if "views" in row else None for row in each["rows"]] for each in made]
    missing = worst(x for row in found for x in row if x is not None)
    return np.array([[missing if x is None else float(x) for x in row] for row in found])


def expected(score: Table, values: Table, count: int) -> NDArray[np.float64]:
    """Of each prompt the value of the best by score, as a mean over all ways to draw `count` of its candidates."""
    total = score.shape[1]
    order = np.argsort(-score, axis=1, kind="stable")
    chance = [math.comb(total - 1 - rank, count - 1) / math.comb(total, count) for rank in range(total)]
    return np.asarray(np.take_along_axis(values, order, 1) @ np.array(chance))


def interval(gains: NDArray[np.float64]) -> dict[str, float]:
    rng = np.random.default_rng(0)
    means = gains[rng.integers(len(gains), size=(RESAMPLES, len(gains)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"gain": round(float(gains.mean()), 4), "from": round(float(low), 4), "to": round(float(high), 4)}


def agreement(one: Table, other: Table) -> NDArray[np.float64]:
    """Of each prompt the rank correlation of its candidates by two measures; 0 where one of them is the same for all.

    Spearman's, with mean ranks for ties.
    """

    def ranks(row: NDArray[np.float64]) -> NDArray[np.float64]:
        return ((row[:, None] > row).sum(1) + (row[:, None] >= row).sum(1)) / 2.0

    found = []
    for a, b in zip(one, other, strict=True):
        x, y = ranks(a), ranks(b)
        x, y = x - x.mean(), y - y.mean()
        norm = float(np.sqrt((x @ x) * (y @ y)))
        found.append(float(x @ y) / norm if norm else 0.0)
    return np.array(found)


def early_look(picture: Table, score: Table) -> dict[str, Any]:
    """Half of the candidates dropped by their pictures: how often the winner stays (chance: 0.5), and scores."""
    kept = np.argsort(-picture, axis=1)[:, : score.shape[1] // 2]
    stays = (kept == score.argmax(1)[:, None]).any(1).astype(float)
    lost = np.take_along_axis(score, kept, 1).max(1) - score.max(1)
    random_half = expected(score, score, score.shape[1] // 2) - score.max(1)
    correlation = agreement(picture, score)
    return {
        "winner_stays": interval(stays),
        "rank_correlation_of_picture_and_score": interval(correlation),
        "score_lost": round(float(lost.mean()), 4),
        "score_lost_by_a_random_half": round(float(random_half.mean()), 4),
    }


def opinions(made: list[dict[str, Any]], nets: list[Path]) -> dict[str, Table]:
    """By name what chooses nothing; higher is better."""
    found = {"nearness": -gathered(made, lambda row: row["distance"], max)}
    if "log_probability" in made[0]["rows"][0]:
        found["judge"] = gathered(made, lambda row: row["log_probability"])
        found["named right"] = gathered(made, lambda row: row["named_right"])
    for path in nets:
        net = referee.load(path)
        found[f"quality by {path.stem}"] = gathered(made, lambda row, net=net: net.score(row["views"].float() / 255))
    return found


def by(made: list[dict[str, Any]], chooser: Path | None) -> Table:
    """What chooses: the final score as it was measured, or with another quality net in it."""
    if chooser is None:
        return np.array([[row["score"] for row in each["rows"]] for each in made])
    net = QualityNet.load(chooser).float().eval()
    iqa = gathered(made, lambda row: scores(logits(net, row["views"][None]))[0])
    found = np.zeros((len(made), CANDIDATES))
    for i, (each, own) in enumerate(zip(made, iqa, strict=True)):
        for k, row in enumerate(each["rows"]):
            if "views" in row:
                found[i, k] = final_score(row["parts"] | {"iqa": float(own[k])})
    return found


def told(made: list[dict[str, Any]], nets: list[Path], chooser: Path | None) -> dict[str, Any]:
    score = by(made, chooser)
    out: dict[str, Any] = {
        "prompts": len(made),
        "spread_of_scores_of_a_prompt": round(float(score.std(1).mean()), 4),
    }
    chosen = {"score": score, "passed": (score >= THRESHOLD).astype(float)}
    for name, values in (chosen | opinions(made, nets)).items():
        one = expected(score, values, 1)
        out[name] = {
            "best of 1": round(float(one.mean()), 4),
            **{f"best of {count}": interval(expected(score, values, count) - one) for count in COUNTS[1:]},
            "the most there is": interval(values.max(1) - one),
            "rank correlation": interval(agreement(score, values)),
        }
    if all("picture" in row for each in made for row in each["rows"]):
        out["early look"] = early_look(gathered(made, lambda row: row["picture"]), score)
    return out


def tell(args: argparse.Namespace) -> None:
    for kind in ("prompt", "stack"):
        paths = sorted(args.folder.glob(f"{kind}_*.pt"))
        if len(paths) > 1:
            made = [torch.load(path, weights_only=True) for path in paths]
            print(json.dumps({f"{kind}s": told(made, args.referee, args.chooser)}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "tell"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--stacks", type=int, default=12)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--referee", type=Path, action="append", default=[], help="weights of another quality net")
    parser.add_argument("--chooser", type=Path, help="folder of the quality net that chooses; default: as measured")
    args = parser.parse_args()
    make_all(args) if args.what == "make" else tell(args)


if __name__ == "__main__":
    main()
