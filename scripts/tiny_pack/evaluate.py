"""Measure the tiny profile on 48 prompts of shapes and colours that its training never saw together.

For each prompt the real pipeline makes a splat; the judge (trained apart, on exact renders) names shape and colour
from 8 views all round; the service's own gates and its threshold for the final score decide, for the right prompt and
for three wrong ones: wrong in shape and colour, in the shape alone, in the colour alone. How far the splat is from an
exact render of what was asked for is told by `distances.py`. With --images the prompts are pictures: exact renders of
those objects from the front, on white.
Writes the splats, evaluation.json, contact.png (8 views of every splat) and gallery.png to the output folder.

    python -m scripts.tiny_pack.evaluate OUT_FOLDER [--prompts 48] [--images] [--config configs/tiny_mv_fast.yaml]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from generation.pipeline import assemble
from generation.pipeline.pipeline import Asset, Request, Scores
from generation.settings import Settings
from generation.splats import ply
from generation.splats.gaussians import Gaussians
from generation.stages.self_check import VIEWS as ALL_ROUND
from generation.stages.self_check import fit_to_frame
from scripts.tiny_pack import judge
from scripts.tiny_pack.captions import ObjectSpec, caption, evaluation_specs
from scripts.tiny_pack.data import front_cameras, render_pool
from scripts.tiny_pack.distances import compared, distance
from scripts.tiny_pack.exact import AZIMUTHS, SIZE, exact_objects, exact_views, framed
from scripts.tiny_pack.render import composite
from scripts.tiny_pack.results import views as seen_all_round
from scripts.tiny_pack.shapes import COLOURS, SHAPES
from scripts.tools.contact_sheet import VIEWS, all_round

TILE = 96
PICTURE = 256  # pixels of an image prompt
THRESHOLD = 0.6  # the service's
UNKNOWN = "Donald Duck"  # words that the pack does not know


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


@torch.no_grad()
def distance_to_exact(splat: Gaussians, spec: ObjectSpec, device: str) -> float:
    """Mean over the validators' views of a splat in their frame."""
    objects, _ = framed(exact_objects([spec], device, random.Random(0), 0.0))
    (rgb,), (alpha,) = exact_views(objects, AZIMUTHS.expand(1, ALL_ROUND), SIZE)
    return float(distance(compared(*seen_all_round(splat)), compared(rgb, alpha)).mean())


def _parts(scores: Scores) -> dict[str, float | None]:
    return {"alignment": scores.alignment_score, "iqa": scores.iqa, "ssim": scores.ssim, "lpips": scores.lpips}


def _right(row: dict[str, Any]) -> bool:
    """Whether the judge names what was asked for."""
    return bool(row.get("shape_right") and row["colour_right"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--images", action="store_true", help="pictures in place of words")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--together", type=int, default=1, help="prompts at once (1 on a CPU)")
    parser.add_argument("--again", action="store_true", help="score the splats that are in OUT_FOLDER")
    args = parser.parse_args()
    folder = args.out / "splats"
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings.resolve({"profile": "tiny", "config": args.config})
    models = settings.models.model_copy(update={"max_batch": args.together})
    pipeline = assemble.load(settings.model_copy(update={"models": models}), print, warm=args.together == 1)
    judging = judge.load()
    rng = random.Random(args.seed)
    specs = evaluation_specs(args.prompts)
    texts, wrong, wrong_texts = [], [], []
    for spec in specs:
        texts.append(caption(spec, rng, plain=True))
        wrong.append(wrong_specs(spec, rng))
        wrong_texts.append({kind: caption(other, rng, plain=True) for kind, other in wrong[-1].items()})
    asked: list[Any] = texts
    wrong_asked: list[dict[str, Any]] = wrong_texts
    if args.images:
        drawn = iter(pictures([*specs, *(other for each in wrong for other in each.values())], args.seed))
        asked = [next(drawn) for _ in specs]
        wrong_asked = [{kind: next(drawn) for kind in each} for each in wrong]
    reasons: dict[int, str] = {}
    numbers = range(0, 0 if args.again else len(specs), args.together)
    for group in (range(start, min(start + args.together, len(specs))) for start in numbers):
        began = time.perf_counter()
        what = "image" if args.images else "prompt"
        outcomes = pipeline.generate([Request(**{what: asked[i]}, seed=args.seed, threshold=THRESHOLD) for i in group])
        for i, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, Asset) and outcome.gaussians is not None:
                (folder / f"{i}.ply").write_bytes(ply.write(fit_to_frame(outcome.gaussians)))
                continue
            reasons[i] = str(outcome.report.rejected) if isinstance(outcome, Asset) else repr(outcome)
        print(f"{group.stop}/{len(specs)} made, {(time.perf_counter() - began) / len(group):.1f} s each", flush=True)
    rows: list[dict] = []
    tiles = []
    for i, (spec, prompt) in enumerate(zip(specs, texts, strict=True)):
        if not (folder / f"{i}.ply").exists():
            rows.append({"prompt": prompt, "passed": False, "reason": reasons.get(i, "no splat")})
            tiles.append(torch.ones(VIEWS, 3, TILE, TILE))
            continue
        splat = (folder / f"{i}.ply").read_bytes()
        gaussians = ply.read(splat).to(settings.device)
        views = all_round(gaussians).cpu()
        tiles.append(F.interpolate(views, size=TILE, mode="area"))
        shape, colour = judging.name(F.interpolate(views, size=judge.SIZE, mode="area"))
        scores = pipeline.validate(splat, asked[i])
        others = {kind: pipeline.validate(splat, other) for kind, other in wrong_asked[i].items()}
        row = {
            "prompt": prompt,
            "passed": scores.score >= THRESHOLD,
            "score": scores.score,
            "parts": _parts(scores),
            "distance": distance_to_exact(gaussians, spec, settings.device),
            "judged": f"{colour} {shape}",
            "shape_right": shape == spec.shape,
            "colour_right": colour == spec.colour,
            "wrong_prompts": wrong_texts[i],
            "wrong_scores": {kind: other.score for kind, other in others.items()},
            "wrong_parts": {kind: _parts(other) for kind, other in others.items()},
        }
        if not args.images:
            row["unknown_parts"] = _parts(pipeline.validate(splat, UNKNOWN))
        rows.append(row)
        print(
            f"{i + 1}/{len(specs)} {prompt}: score {row['score']:.2f}, judged {row['judged']}, "
            f"as {wrong_texts[i]['both']!r} {others['both'].score:.2f}",
            flush=True,
        )
    count = len(rows)
    named = [r["parts"]["iqa"] for r in rows if _right(r)]
    named = [iqa for iqa in named if iqa is not None]
    distances = [r["distance"] for r in rows if "distance" in r]
    summary = {
        "prompts": count,
        "shape_accuracy": round(sum(r.get("shape_right", False) for r in rows) / count, 3),
        "colour_accuracy": round(sum(r.get("colour_right", False) for r in rows) / count, 3),
        "right_prompt_passed": round(sum(r["passed"] for r in rows) / count, 3),
        "named_right_and_passed": round(sum(r["passed"] and _right(r) for r in rows) / count, 3),
        "wrong_prompt_passed": {
            kind: round(sum(r["wrong_scores"][kind] >= THRESHOLD for r in rows if "wrong_scores" in r) / count, 3)
            for kind in ("both", "shape", "colour")
        },
        "mean_distance": round(statistics.mean(distances), 4) if distances else None,
        "named_right_quality_at_least_0.7": round(sum(q >= 0.7 for q in named) / len(named), 3) if named else None,
    }
    (args.out / "evaluation.json").write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")
    save_image(make_grid(torch.cat(tiles), nrow=2 * VIEWS, pad_value=1.0), args.out / "contact.png")
    save_image(make_grid(torch.stack([t[1] for t in tiles]), nrow=12, pad_value=1.0), args.out / "gallery.png")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
