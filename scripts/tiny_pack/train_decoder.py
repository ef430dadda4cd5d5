"""Sharpen the decoder of a trained autoencoder: `python -m scripts.tiny_pack.train_decoder flux|mvdream`.

The encoder stays as it is, so the latents that the diffusion models learned keep their meaning. The loss counts an
object's pixels more than the backdrop's: grey parts on the grey backdrop are what a plain loss gives up first.
"""

from __future__ import annotations

import json
import sys

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import l1_loss

from . import models
from .data import front_cameras, render_pool, two_rings
from .render import composite
from .training import arguments, autocast, fit, forget_paths, psnr

GREY = 0.5
OBJECT_WEIGHT = 4.0


def main() -> None:
    which = sys.argv.pop(1)
    args = arguments(__doc__, minutes=15)
    folder = args.pack / which / "vae"
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(args.device)
    vae.encoder.requires_grad_(False)
    size, cameras = (models.FLUX_SIZE, front_cameras) if which == "flux" else (models.MVDREAM_SIZE, two_rings)
    cache = args.work / f"pool_{which}.pt"
    pool = render_pool(args.objects or 1500, cameras, size, args.device, args.seed + 1, cache=cache)
    images = pool.rgba.flatten(0, 1)
    batch = args.batch or 16

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        rgba = images[torch.randint(len(images), (n,), device=args.device)].float() / 255
        return composite(rgba, GREY) * 2 - 1, rgba[:, 3:]

    def decoded(module: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mode()
            z = z + 0.05 * z.std() * torch.randn_like(z)  # what a diffusion model is off by
        return module.decode(z).sample

    def loss() -> torch.Tensor:
        x, alpha = draw(batch)
        with autocast(args):
            y = decoded(vae, x)
        weight = 1 + OBJECT_WEIGHT * alpha
        edges = l1_loss(y[..., 1:] - y[..., :-1], x[..., 1:] - x[..., :-1])
        return (
            (weight * (y - x).abs()).mean()
            + edges
            + l1_loss(y[..., 1:, :] - y[..., :-1, :], x[..., 1:, :] - x[..., :-1, :])
        )

    torch.manual_seed(args.seed)
    with torch.no_grad():
        held = draw(64)[0]
        before = psnr(decoded(vae, held) / 2 + 0.5, held / 2 + 0.5)
    best, run = fit(f"decoder_{which}", vae, loss, args, lr=4e-4, weight_decay=0.0, decay=0.995)
    with torch.no_grad():
        after = psnr(decoded(best, held).clamp(-1, 1) / 2 + 0.5, held / 2 + 0.5)
    best.half().save_pretrained(folder)
    forget_paths(folder)
    card = json.loads((folder / "card.json").read_text())
    card["decoder"] = {"script": f"scripts/tiny_pack/train_decoder.py {which}", "seed": args.seed, **run}
    card["quality"]["psnr_db_on_grey"] = {"before": round(before, 2), "after": round(after, 2)}
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"decoder_{which}: {before:.2f} to {after:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
