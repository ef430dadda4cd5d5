"""Train the autoencoder of one image model of the pack: `python -m scripts.tiny_pack.train_vae flux|mvdream`."""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import l1_loss

from . import models
from .data import front_cameras, render_pool, two_rings
from .render import composite
from .training import arguments, autocast, compiled, fit, psnr, write_card


def backdrops(n: int, device: str) -> torch.Tensor:
    """Grey levels (n, 1, 1, 1): mid grey mostly, any other at times."""
    grey = torch.rand(n, 1, 1, 1, device=device)
    return torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.6, torch.full_like(grey, 0.5), grey)


def _edges(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([(x[..., 1:, :-1] - x[..., :-1, :-1]), (x[..., :-1, 1:] - x[..., :-1, :-1])], 1)


def main() -> None:
    which = sys.argv.pop(1)
    args = arguments(__doc__, minutes=4)
    vae = (models.flux_vae() if which == "flux" else models.mvdream_vae()).to(args.device)
    size, cameras = (models.FLUX_SIZE, front_cameras) if which == "flux" else (models.MVDREAM_SIZE, two_rings)
    count = args.objects or (5_000 if which == "flux" else 2_000)
    pool = render_pool(count, cameras, size, args.device, args.seed)
    images = pool.rgba.flatten(0, 1)
    batch = args.batch or (192 if which == "flux" else 512)

    def draw(n: int) -> torch.Tensor:
        rgba = images[torch.randint(len(images), (n,), device=args.device)].float() / 255
        return composite(rgba, backdrops(n, args.device)) * 2 - 1

    def objective(x: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / x[0].numel()
        return l1_loss(y, x) + l1_loss(_edges(y), _edges(x)) + 1e-4 * kl

    fused = compiled(objective, args)

    def loss() -> torch.Tensor:
        with autocast(args):
            return fused(draw(batch))

    best, run = fit(f"vae_{which}", vae, loss, args, lr=1.5e-3, weight_decay=0.0)
    with torch.no_grad():
        x = draw(64)
        z = best.encode(x).latent_dist.mode()
        quality = {"psnr_db": round(psnr((best.decode(z).sample.clamp(-1, 1) + 1) / 2, (x + 1) / 2), 2)}
        z = best.encode(draw(64)).latent_dist.mode()
    best.register_to_config(scaling_factor=round(float(1 / z.std()), 4))
    if which == "flux":
        best.register_to_config(shift_factor=round(float(z.mean()), 4))
    folder = args.pack / which / "vae"
    best.half().save_pretrained(folder)
    write_card(folder, f"tiny-{which}-vae", f"scripts/tiny_pack/train_vae.py {which}", args.seed, run, quality)
    print(f"vae_{which}: {quality}", flush=True)


if __name__ == "__main__":
    main()
