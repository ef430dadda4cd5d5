"""Measure the tiny profile on 48 prompts of shapes and colours that its training never saw together.

For each prompt the real pipeline makes a splat; the judge (trained apart, on exact renders) names shape and colour
from 8 views all round; the service's own gates and CLIP threshold decide, for the right prompt and for another one.
Writes evaluation.json, contact.png (8 views of every splat) and gallery.png to the output folder.

    python -m scripts.evaluate_tiny OUT_FOLDER [--prompts 48] [--config configs/tiny_mv_fast.yaml]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid, save_image

from generation.pipeline import Asset, Pipeline, Request
from generation.self_check import ELEVATION, FOVY, RADIUS, fit_to_frame
from generation.settings import Settings
from generation.splats import ply
from generation.splats.cameras import orbit
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize
from scripts.tiny_pack import judge
from scripts.tiny_pack.captions import ObjectSpec, caption, evaluation_specs

VIEWS = 8
SIZE = 192
TILE = 96


@torch.no_grad()
def all_round(gaussians: Gaussians) -> Tensor:
    """Eight views (8, 3, 192, 192) on white, 45 degrees apart, at the validators' camera."""
    cameras = orbit(ELEVATION, torch.arange(VIEWS) * (360.0 / VIEWS), RADIUS, FOVY, SIZE, SIZE)
    rgb, _, _ = rasterize(fit_to_frame(gaussians), cameras, SIZE, SIZE, torch.ones(3))
    return rgb.permute(0, 3, 1, 2).clamp(0, 1)


def wrong_prompt(specs: list[ObjectSpec], index: int, rng: random.Random) -> str:
    """Another prompt of the list, with another shape and another colour."""
    mine = specs[index]
    others = [s for s in specs if s.shape != mine.shape and s.colour != mine.colour]
    return caption(rng.choice(others), rng, plain=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline.load(Settings.resolve({"profile": "tiny", "config": args.config}), print)
    threshold = 0.6
    judging = judge.load()
    rng = random.Random(args.seed)
    specs = evaluation_specs(args.prompts)
    rows: list[dict] = []
    tiles = []
    for i, spec in enumerate(specs):
        prompt = caption(spec, rng, plain=True)
        began = time.perf_counter()
        (outcome,) = pipeline.generate([Request(prompt, None, args.seed, threshold, None)])
        seconds = time.perf_counter() - began
        if not isinstance(outcome, Asset) or outcome.gaussians is None:
            reason = outcome.report.rejected if isinstance(outcome, Asset) else repr(outcome)
            rows.append({"prompt": prompt, "passed": False, "reason": reason, "seconds": round(seconds, 1)})
            tiles.append(torch.ones(VIEWS, 3, TILE, TILE))
            print(f"{i + 1}/{len(specs)} {prompt}: {reason}", flush=True)
            continue
        views = all_round(outcome.gaussians)
        tiles.append(F.interpolate(views, size=TILE, mode="area"))
        shape, colour = judging.name(F.interpolate(views, size=judge.SIZE, mode="area"))
        other = wrong_prompt(specs, i, rng)
        check = pipeline.validate(ply.write(fit_to_frame(outcome.gaussians)), other).score
        row = {
            "prompt": prompt,
            "passed": outcome.report.rejected is None,
            "score": outcome.report.score,
            "gaussians": outcome.report.num_gaussians,
            "judged": f"{colour} {shape}",
            "shape_right": shape == spec.shape,
            "colour_right": colour == spec.colour,
            "wrong_prompt": other,
            "wrong_score": check,
            "wrong_passed": check >= threshold,
            "seconds": round(seconds, 1),
            "stages": {k: round(v, 2) for k, v in outcome.report.seconds.items()},
        }
        rows.append(row)
        print(
            f"{i + 1}/{len(specs)} {prompt}: score {row['score']:.2f}, judged {row['judged']}, "
            f"as '{other}' {check:.2f}, {seconds:.1f} s",
            flush=True,
        )
    count = len(rows)
    summary = {
        "prompts": count,
        "shape_accuracy": round(sum(r.get("shape_right", False) for r in rows) / count, 3),
        "colour_accuracy": round(sum(r.get("colour_right", False) for r in rows) / count, 3),
        "right_prompt_passed": round(sum(r["passed"] for r in rows) / count, 3),
        "wrong_prompt_passed": round(sum(r.get("wrong_passed", False) for r in rows) / count, 3),
        "median_seconds": sorted(r["seconds"] for r in rows)[count // 2],
    }
    (args.out / "evaluation.json").write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    save_image(make_grid(torch.cat(tiles), nrow=2 * VIEWS, pad_value=1.0), args.out / "contact.png")
    save_image(make_grid(torch.stack([t[1] for t in tiles]), nrow=12, pad_value=1.0), args.out / "gallery.png")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
