"""How many Gaussians the full profile's configs end with, and where they are, under the tiny pack's trained guidance.

    python -m scripts.tools.densification OUT_FOLDER [--configs text_mv_fast ...] [--prompts TEXT ...]
    [--threshold-times X]

The full-size weights are not here, so the real pipeline runs with the tiny models and the configs as they are, but for
what the tiny models were trained for (TINY). Writes each splat to OUT_FOLDER, for scripts/tools/contact_sheet.py, and
prints one line for each with
    the number of Gaussians at iterations 50, 100, ... and at the end,
    transparent: an opacity under 0.05,
    and of the others
    outside: centres beside the object's outline in any of the validators' 16 views,
    hidden: inside, with less than SEEN pixels of their colour in an average view,
    seen: all others.
With --threshold-times X, densify_grad_threshold is X times the config's: as under a guidance whose gradients are 1/X as
strong.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.dreamgaussian.scene import Scene
from generation.pipeline import assemble
from generation.pipeline.pipeline import Asset, Pipeline, Request
from generation.settings import CONFIGS, Settings
from generation.splats import ply
from generation.splats.cameras import orbit
from generation.splats.gaussians import SH_C0, Gaussians
from generation.splats.rasterize import rasterize
from generation.stages.self_check import ELEVATION, FOVY, RADIUS, VIEW_SIZE, VIEWS, fit_to_frame

TINY = {
    "elevation": -20.0,  # the tiny FLUX draws objects from above
    "ref_size": 64,  # the tiny MVDream sees 64 pixels where the public one sees 256
    "render_size": 64,
    "background": (1.0, 0.0, 1.0),  # the only one that it knows
    "guidance_scale": 5.0,  # as configs/tiny_mv_fast.yaml has it
    "negative_prompt": "",  # it was trained against no words at all
}
PROMPTS = ["a red cube", "a yellow mug", "a green robot", "a blue sofa"]
EVERY = 50  # iterations
OPAQUE, SEEN = 0.05, 0.05


def where(gaussians: Gaussians) -> dict[str, int]:
    """How many Gaussians are transparent, outside, hidden and seen (see the top of this file)."""
    sh = torch.zeros(len(gaussians), 1, 3, requires_grad=True)
    fitted = replace(fit_to_frame(gaussians), sh=sh)
    cameras = orbit(ELEVATION, torch.arange(VIEWS) * (360.0 / VIEWS), RADIUS, FOVY, VIEW_SIZE, VIEW_SIZE)
    rgb, alpha, info = rasterize(fitted, cameras, VIEW_SIZE, VIEW_SIZE, torch.zeros(3))
    (weights,) = torch.autograd.grad(rgb[..., 0].sum(), sh)  # a colour's derivative is its share of the pixel
    seen = weights[:, 0, 0] / SH_C0 / VIEWS >= SEEN
    x, y = info["means2d"].long().clamp(0, VIEW_SIZE - 1).unbind(-1)
    inside = (alpha[torch.arange(VIEWS)[:, None], y, x, 0] > 0.5).all(0)
    opaque = gaussians.logit_opacities.sigmoid() >= OPAQUE
    return {
        "transparent": int((~opaque).sum()),
        "outside": int((opaque & ~inside).sum()),
        "hidden": int((opaque & inside & ~seen).sum()),
        "seen": int((opaque & inside & seen).sum()),
    }


def run(pipeline: Pipeline, prompt: str) -> tuple[Asset, list[int]]:
    """What came of the prompt, and the number of Gaussians after each EVERY iterations."""
    job, counts = pipeline.begin(Request(prompt=prompt, seed=0, threshold=0.0)), {}
    while job.outcome is None:
        pipeline.tick([job])
        if isinstance(job.work, Scene) and job.work.iteration % EVERY == 0:
            counts[job.work.iteration] = len(job.work.gaussians())
    if isinstance(job.outcome, Exception):
        raise job.outcome
    return job.outcome, list(counts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--configs", nargs="+", default=["text_mv_fast", "text_mv_ultra_fast"])
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--threshold-times", type=float, default=1.0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for config in args.configs:
        settings = Settings.resolve({"profile": "tiny", "config": CONFIGS / f"{config}.yaml"})
        options = settings.options
        assert isinstance(options, DreamGaussianOptions)
        threshold = options.densify_grad_threshold * args.threshold_times
        options = options.model_copy(update=TINY | {"densify_grad_threshold": threshold})
        pipeline = assemble.load(settings.model_copy(update={"options": options, "image_options": options}))
        print(f"{config}: {options.iters} iterations from {options.num_pts:,} Gaussians, threshold {threshold:g}")
        for prompt in args.prompts:
            began = time.perf_counter()
            asset, counts = run(pipeline, prompt)
            seconds = time.perf_counter() - began
            if asset.gaussians is None:
                print(f"  {prompt}: {asset.report.rejected}", flush=True)
                continue
            (args.out / f"{config}, {prompt}.ply").write_bytes(ply.write(asset.gaussians))
            places = ", ".join(f"{name} {count}" for name, count in where(asset.gaussians).items())
            score = f"{asset.report.score:.2f}" if asset.report.score is not None else asset.report.rejected
            print(f"  {prompt}: {' '.join(map(str, counts))}; {places}; CLIP {score}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
