"""Measure on the tiny pack what the best of 1, 2, 4 and 8 candidates gains, and what an early look would cost.

The final score chooses, so the chosen one's score is higher by construction. What it gains is said by the judge, which
chooses nothing: how often it names shape and colour as they were asked for, and the log-probability that it gives them.
Of 8 candidates of a prompt, those of N are 8/N blocks of N; figures are means over blocks, and their standard errors
those of the mean over prompts. Early look: candidates are ranked by CLIP's cosine of the drawn picture with the prompt.

    python -m scripts.tiny_pack.best_of OUT.json [--prompts 12] [--config configs/tiny_lgm.yaml] [--seconds 300]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from generation.fleet.candidates import merit, seed_of
from generation.pipeline import assemble
from generation.pipeline.pipeline import Asset, Pipeline, Request
from generation.settings import Settings
from generation.splats import ply
from scripts.tiny_pack import judge
from scripts.tiny_pack.captions import ObjectSpec, caption, evaluation_specs
from scripts.tiny_pack.shapes import COLOURS, SHAPES
from scripts.tools.contact_sheet import all_round

CANDIDATES = 8
SEED = 1000
THRESHOLD = 0.6  # the service's
MEASURES = ("score", "passed", "named_right", "log_probability")

Table = NDArray[np.float64]


@torch.no_grad()
def look(judging: judge.Judge, views: torch.Tensor, spec: ObjectSpec) -> tuple[bool, float]:
    """Whether the judge names shape and colour as asked, and the log-probability that it gives both."""
    shape, colour = (logits.log_softmax(1).mean(0).cpu() for logits in judging(views))
    right = list(SHAPES).index(spec.shape), list(COLOURS).index(spec.colour)
    named = int(shape.argmax()), int(colour.argmax())
    return named == right, float(shape[right[0]] + colour[right[1]])


def make(
    pipeline: Pipeline, judging: judge.Judge, spec: ObjectSpec, prompt: str, seeds: list[int], device: str
) -> list[dict[str, Any]]:
    """Candidates that share their ticks, and what is said of each."""
    began = time.perf_counter()
    jobs = [pipeline.begin(Request(prompt=prompt, seed=seed, threshold=0.0)) for seed in seeds]
    while unfinished := [job for job in jobs if job.outcome is None]:
        pipeline.tick(unfinished)
    seconds = (time.perf_counter() - began) / len(jobs)
    rows = []
    for job in jobs:
        picture = None
        if job.image is not None:
            clip = pipeline._self_check._text
            picture = float(clip.embed(job.image[None])[0].float() @ clip.encode([prompt])[0].float())
        row: dict[str, Any] = {"seed": job.request.seed, "seconds": seconds, "picture": picture}
        if isinstance(job.outcome, Asset) and job.outcome.ply:
            views = F.interpolate(all_round(ply.read(job.outcome.ply).to(device)).cpu(), size=judge.SIZE, mode="area")
            row["named_right"], row["log_probability"] = look(judging, views, spec)
            report = job.outcome.report
            row |= {"score": merit(report), "parts": report.parts, "passed": (report.score or 0.0) >= THRESHOLD}
        else:
            row |= {"score": 0.0, "passed": False, "named_right": False, "log_probability": None}
        rows.append(row)
    return rows


def chosen(rows: list[list[dict[str, Any]]], count: int) -> dict[str, Table]:
    """By measure, of each prompt: the mean over blocks of ``count`` candidates, of each the one with the best score."""
    found: dict[str, list[float]] = {measure: [] for measure in (*MEASURES, "seconds")}
    worst = min(each["log_probability"] for row in rows for each in row if each["log_probability"] is not None)
    for row in rows:
        blocks = [row[start : start + count] for start in range(0, len(row) - count + 1, count)]
        best = [max(block, key=lambda each: each["score"]) for block in blocks]
        for measure in MEASURES:
            values = [worst if each[measure] is None else float(each[measure]) for each in best]
            found[measure].append(float(np.mean(values)))
        found["seconds"].append(float(np.mean([sum(each["seconds"] for each in block) for block in blocks])))
    return {measure: np.array(values) for measure, values in found.items()}


def early_look(rows: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Half of the candidates dropped by their pictures: how often the winner stays (chance: 0.5), and scores."""
    kept, after, whole = [], [], []
    for row in rows:
        half = sorted(row, key=lambda each: -each["picture"])[: len(row) // 2]
        best = max(row, key=lambda each: each["score"])
        kept.append(best in half)
        after.append(max(each["score"] for each in half))
        whole.append(best["score"])
    correlation = [
        float(np.corrcoef([each["picture"] for each in row], [each["score"] for each in row])[0, 1])
        for row in rows
        if len({each["score"] for each in row}) > 1
    ]
    return {
        "winner_kept": float(np.mean(kept)),
        "best_score_of_the_kept_half": float(np.mean(after)),
        "best_score_of_all": float(np.mean(whole)),
        "mean_correlation_of_picture_and_score": float(np.mean(correlation or [0.0])),
    }


def summary(rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
    one = chosen(rows, 1)
    told: dict[str, Any] = {"prompts": len(rows)}
    for count in (1, 2, 4, CANDIDATES):
        of = chosen(rows, count)
        told[f"best_of_{count}"] = {"seconds": round(float(of["seconds"].mean()), 2)} | {
            measure: {
                "mean": round(float(of[measure].mean()), 4),
                "gain": round(float((of[measure] - one[measure]).mean()), 4),
                "standard_error": round(float((of[measure] - one[measure]).std(ddof=1) / len(rows) ** 0.5), 4),
            }
            for measure in MEASURES
        }
    if all(each["picture"] is not None for row in rows for each in row):
        told["early_look"] = {name: round(value, 4) for name, value in early_look(rows).items()}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--together", type=int, default=1, help="candidates at once (1 on a CPU)")
    parser.add_argument("--seconds", type=float, default=300.0, help="no prompt is begun later")
    args = parser.parse_args()
    settings = Settings.resolve({"profile": "tiny", "config": args.config})
    models = settings.models.model_copy(update={"max_batch": args.together})
    pipeline = assemble.load(settings.model_copy(update={"models": models}), print, warm=args.together == 1)
    judging = judge.load()
    rng = random.Random(0)
    rows: list[list[dict[str, Any]]] = []
    began = time.perf_counter()
    for spec in evaluation_specs(args.prompts):
        if time.perf_counter() - began > args.seconds:
            break
        prompt = caption(spec, rng, plain=True)
        seeds = [seed_of(SEED, number) for number in range(CANDIDATES)]
        groups = [seeds[start : start + args.together] for start in range(0, CANDIDATES, args.together)]
        made = [make(pipeline, judging, spec, prompt, group, settings.device) for group in groups]
        rows.append([row for group in made for row in group])
        print(prompt, [round(each["score"], 2) for each in rows[-1]], flush=True)
        if len(rows) > 1:
            args.out.write_text(json.dumps({"summary": summary(rows), "rows": rows}, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
