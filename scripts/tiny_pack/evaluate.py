"""Measure the tiny profile on 48 prompts of shapes and colours that its training never saw together.

For each prompt the real pipeline makes a splat; the judge (trained apart, on exact renders) names shape and colour
from 8 views all round; the service's own gates and its threshold for the final score decide, for the right prompt and
for three wrong ones: wrong in shape and colour, in the shape alone, in the colour alone. With --images the prompts are
pictures: exact renders of those objects from the front, on white.
Writes evaluation.json, contact.png (8 views of every splat) and gallery.png to the output folder.

    python -m scripts.tiny_pack.evaluate OUT_FOLDER [--prompts 48] [--images] [--config configs/tiny_mv_fast.yaml]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from generation.pipeline import assemble
from generation.pipeline.pipeline import Asset, Request
from generation.settings import Settings
from generation.splats import ply
from generation.stages.self_check import fit_to_frame
from scripts.tiny_pack import judge
from scripts.tiny_pack.captions import ObjectSpec, caption, evaluation_specs
from scripts.tiny_pack.data import front_cameras, render_pool
from scripts.tiny_pack.render import composite
from scripts.tiny_pack.shapes import COLOURS, SHAPES
from scripts.tools.contact_sheet import VIEWS, all_round

TILE = 96
PICTURE = 256  # pixels of an image prompt


def wrong_specs(spec: ObjectSpec, rng: random.Random) -> dict[str, ObjectSpec]:
    """Another shape and colour, another shape, another colour."""
    shape = rng.choice([s for s in SHAPES if s != spec.shape])
    colour = rng.choice([c for c in COLOURS if c != spec.colour])
    wrong = {"both": (shape, colour), "shape": (shape, spec.colour), "colour": (spec.shape, colour)}
    return {kind: ObjectSpec(*pair) for kind, pair in wrong.items()}


def pictures(specs: list[ObjectSpec], seed: int) -> list[Image.Image]:
    """Exact renders from the front, on white."""
    pool = render_pool(len(specs), front_cameras, PICTURE, "cpu", seed, specs=specs)
    return [to_pil_image(composite(rgba.float() / 255, 1.0)) for rgba in pool.rgba[:, 0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--images", action="store_true", help="pictures in place of words")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = assemble.load(Settings.resolve({"profile": "tiny", "config": args.config}), print)
    threshold = 0.6
    judging = judge.load()
    rng = random.Random(args.seed)
    specs = evaluation_specs(args.prompts)
    texts, wrong, wrong_texts = [], [], []
    for spec in specs:
        texts.append(caption(spec, rng, plain=True))
        wrong.append(wrong_specs(spec, rng))
        wrong_texts.append({kind: caption(other, rng, plain=True) for kind, other in wrong[-1].items()})
    images, wrong_images = [], []
    if args.images:
        drawn = iter(pictures([*specs, *(other for each in wrong for other in each.values())], args.seed))
        images = [next(drawn) for _ in specs]
        wrong_images = [{kind: next(drawn) for kind in each} for each in wrong]
    rows: list[dict] = []
    tiles = []
    for i, (spec, prompt) in enumerate(zip(specs, texts, strict=True)):
        began = time.perf_counter()
        asked = {"image": images[i]} if images else {"prompt": prompt}
        (outcome,) = pipeline.generate([Request(**asked, seed=args.seed, threshold=threshold)])
        seconds = time.perf_counter() - began
        if not isinstance(outcome, Asset) or outcome.gaussians is None:
            reason = outcome.report.rejected if isinstance(outcome, Asset) else repr(outcome)
            row = {"prompt": prompt, "passed": False, "reason": reason, "seconds": round(seconds, 1)}
            rows.append(row | ({"parts": outcome.report.parts} if isinstance(outcome, Asset) else {}))
            tiles.append(torch.ones(VIEWS, 3, TILE, TILE))
            print(f"{i + 1}/{len(specs)} {prompt}: {reason}", flush=True)
            continue
        views = all_round(outcome.gaussians)
        tiles.append(F.interpolate(views, size=TILE, mode="area"))
        shape, colour = judging.name(F.interpolate(views, size=judge.SIZE, mode="area"))
        splat = ply.write(fit_to_frame(outcome.gaussians))
        others = wrong_images[i] if images else wrong_texts[i]
        wrong_scores = {kind: pipeline.validate(splat, other).score for kind, other in others.items()}
        row = {
            "prompt": prompt,
            "passed": outcome.report.rejected is None,
            "score": outcome.report.score,
            "parts": outcome.report.parts,
            "gaussians": outcome.report.num_gaussians,
            "judged": f"{colour} {shape}",
            "shape_right": shape == spec.shape,
            "colour_right": colour == spec.colour,
            "wrong_prompts": wrong_texts[i],
            "wrong_scores": wrong_scores,
            "seconds": round(seconds, 1),
            "stages": {k: round(v, 2) for k, v in outcome.report.seconds.items()},
        }
        rows.append(row)
        print(
            f"{i + 1}/{len(specs)} {prompt}: score {row['score']:.2f}, judged {row['judged']}, "
            f"as {wrong_texts[i]['both']!r} {wrong_scores['both']:.2f}, {seconds:.1f} s",
            flush=True,
        )
    count = len(rows)
    named = [r["parts"]["iqa"] for r in rows if r.get("shape_right") and r["colour_right"]]
    named = [iqa for iqa in named if iqa is not None]
    summary = {
        "prompts": count,
        "shape_accuracy": round(sum(r.get("shape_right", False) for r in rows) / count, 3),
        "colour_accuracy": round(sum(r.get("colour_right", False) for r in rows) / count, 3),
        "right_prompt_passed": round(sum(r["passed"] for r in rows) / count, 3),
        "wrong_prompt_passed": {
            kind: round(sum(r["wrong_scores"][kind] >= threshold for r in rows if "wrong_scores" in r) / count, 3)
            for kind in ("both", "shape", "colour")
        },
        "named_right_quality_at_least_0.7": round(sum(q >= 0.7 for q in named) / len(named), 3) if named else None,
        "median_seconds": sorted(r["seconds"] for r in rows)[count // 2],
    }
    (args.out / "evaluation.json").write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    save_image(make_grid(torch.cat(tiles), nrow=2 * VIEWS, pad_value=1.0), args.out / "contact.png")
    save_image(make_grid(torch.stack([t[1] for t in tiles]), nrow=12, pad_value=1.0), args.out / "gallery.png")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
