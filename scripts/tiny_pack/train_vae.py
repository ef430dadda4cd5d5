"""Train the autoencoder of one image model of the pack: `python -m scripts.tiny_pack.train_vae flux|mvdream`.

With `--tune` MVDream's latents of what the pack's own encoder saw so far are kept where they are, so that the diffusion
model that learned them has little to learn anew. Of FLUX's only the decoder learns.
"""

from __future__ import annotations

import copy
import sys

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import l1_loss, mse_loss

from . import models
from .data import front_cameras, over_backdrop, render_pool, two_rings
from .render import composite
from .training import arguments, autocast, compiled, fit, forget_paths, psnr, write_card

GREY = 0.5
OBJECT_WEIGHT = 3.0  # an object's pixels count more than the backdrop's by this
LATENT_NOISE = 0.05  # share of the latents' deviation: what a diffusion model is off by
ANCHOR = 0.15
CONTRAST, MOST = 0.3, 4.0  # parts that differ less from the backdrop count more, by up to this, or matting loses them


def _edges(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([(x[..., 1:, :-1] - x[..., :-1, :-1]), (x[..., :-1, 1:] - x[..., :-1, :-1])], 1)


def main() -> None:
    which = sys.argv.pop(1)
    args = arguments(__doc__, minutes=4)
    folder = args.pack / which / "vae"
    if args.tune:
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    else:
        vae = models.flux_vae() if which == "flux" else models.mvdream_vae()
    vae.to(args.device)
    decoder_only = args.tune and which == "flux"
    if decoder_only:
        vae.encoder.requires_grad_(False)
    before = copy.deepcopy(vae).eval().requires_grad_(False)
    size, cameras = (models.FLUX_SIZE, front_cameras) if which == "flux" else (models.MVDREAM_SIZE, two_rings)
    count = args.objects or (5_000 if which == "flux" else 2_000)
    cache = args.work / f"pool_{which}.pt"
    images = render_pool(count, cameras, size, args.device, args.seed, cache=cache).rgba.flatten(0, 1)
    batch = args.batch or (192 if which == "flux" else 512)

    def draw(n: int) -> torch.Tensor:
        """Premultiplied RGBA (n, 4, S, S) in 0..1."""
        return images[torch.randint(len(images), (n,), device=args.device)].float() / 255

    def shown(rgba: torch.Tensor) -> torch.Tensor:
        return (composite(rgba, GREY) if which == "flux" else over_backdrop(rgba)) * 2 - 1

    def objective(rgba: torch.Tensor) -> torch.Tensor:
        x = shown(rgba)
        posterior = vae.encode(x).latent_dist
        z = posterior.mode() if args.tune else posterior.sample()
        y = vae.decode(z + LATENT_NOISE * z.detach().std() * torch.randn_like(z)).sample
        weight = OBJECT_WEIGHT * rgba[:, 3:]
        if which == "flux":
            contrast = (x / 2 + 0.5 - GREY).abs().amax(1, keepdim=True)
            weight = weight * (CONTRAST / contrast.clamp_min(1e-3)).clamp(1, MOST)
        error = ((1 + weight) * (y - x).abs()).mean() + l1_loss(_edges(y), _edges(x))
        if args.tune and not decoder_only:
            with torch.no_grad():
                kept = before.encode(composite(rgba, GREY) * 2 - 1).latent_dist.mode()
            return error + ANCHOR * mse_loss(z, kept) / kept.var()
        if decoder_only:
            return error
        return error + 1e-4 * posterior.kl().mean() / x[0].numel()

    fused = compiled(objective, args)

    def loss() -> torch.Tensor:
        with autocast(args):
            return fused(draw(batch))

    best, run = fit(f"vae_{which}", vae, loss, args, lr=5e-4 if args.tune else 1.5e-3, weight_decay=0.0, decay=0.995)
    with torch.no_grad():
        x = shown(draw(64))
        z = best.encode(x).latent_dist.mode()
        quality = {"psnr_db": round(psnr((best.decode(z).sample.clamp(-1, 1) + 1) / 2, (x + 1) / 2), 2)}
    if not args.tune:
        best.register_to_config(scaling_factor=round(float(1 / z.std()), 4))
        if which == "flux":
            best.register_to_config(shift_factor=round(float(z.mean()), 4))
    best.half().save_pretrained(folder)
    forget_paths(folder)
    write_card(folder, f"tiny-{which}-vae", f"scripts/tiny_pack/train_vae.py {which}", args, run, quality)
    print(f"vae_{which}: {quality}", flush=True)


if __name__ == "__main__":
    main()
