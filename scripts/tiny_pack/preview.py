"""Contact sheets of what the pack's two image models draw (`python -m scripts.tiny_pack.preview OUT_FOLDER`)."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FluxPipeline, UNet2DConditionModel
from torchvision.utils import make_grid, save_image
from transformers import CLIPTextModel, CLIPTokenizer

from generation.generators.multiview.attention import camera_embedding, join_views

from .captions import caption, evaluation_specs
from .models import FLUX_SIZE
from .render import FRONT_ELEVATION, orbit
from .text import MAX_TOKENS, T5_TOKENS
from .training import PACK


@torch.no_grad()
def flux_sheet(pack: Path, prompts: list[str], device: str, steps: int) -> torch.Tensor:
    pipe = FluxPipeline.from_pretrained(pack / "flux", dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=0.0,
        height=FLUX_SIZE,
        width=FLUX_SIZE,
        max_sequence_length=T5_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return make_grid(out.images.cpu(), nrow=12)


@torch.no_grad()
def mvdream_sheet(
    pack: Path, prompts: list[str], device: str, views: int, steps: int = 25, scale: float = 3.0
) -> torch.Tensor:
    folder = pack / "mvdream"
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(device)
    join_views(unet, views)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    azimuth = torch.arange(views) * (360.0 / views)
    camera = camera_embedding(orbit(torch.full((views,), FRONT_ELEVATION), azimuth)).to(device)
    g = torch.Generator().manual_seed(0)
    rows = []
    for prompt in prompts:
        ids = tokenizer(["", prompt], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        words = text(ids.to(device)).last_hidden_state.repeat_interleave(views, 0)
        latents = torch.randn(views, 4, 16, 16, generator=g).to(device)
        for t in scheduler.timesteps:
            both = unet(latents.repeat(2, 1, 1, 1), t, words, class_labels=camera.repeat(2, 1)).sample
            without, given = both.chunk(2)
            latents = scheduler.step(without + scale * (given - without), t, latents).prev_sample
        images = vae.decode(latents / vae.config.scaling_factor).sample
        rows.append(((images + 1) / 2).clamp(0, 1).cpu())
    return make_grid(torch.cat(rows), nrow=views * max(1, 16 // views))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pack", type=Path, default=PACK)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    prompts = [caption(spec, rng, plain=True) for spec in evaluation_specs()]
    for steps in (4, 2):
        save_image(flux_sheet(args.pack, prompts, args.device, steps), args.out / f"flux_{steps}_steps.png")
    for views in (4, 8):
        save_image(mvdream_sheet(args.pack, prompts, args.device, views), args.out / f"mvdream_{views}_views.png")


if __name__ == "__main__":
    main()
