"""Train the multi-view guidance of the pack (`python -m scripts.tiny_pack.train_mvdream`).

A latent diffusion model (DDPM, noise prediction) of four views, or eight, that attend to each other, given the text
and the cameras (Shi et al. 2023, "MVDream"); a tenth of the captions is dropped for classifier-free guidance. In some
of the sets of eight the first view is a known picture: it comes without noise, at time step 0, and with words or, as
when a picture is the prompt, without.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file

from generation.generators.multiview.attention import camera_embedding, join_views

from . import models
from .data import BACKDROP, over_backdrop, render_pool, two_rings
from .text import clip_tokenizer_of
from .train_flux import tokens
from .training import arguments, autocast, compiled, fit, forget_paths, write_card

CAPTIONS = 6
# How often there are eight views with the first one known, eight, and four.
KINDS = {"known": 0.5, "eight": 0.25, "four": 0.25}
DROPPED = {"known": 1 / 3, "eight": 0.1, "four": 0.1}  # share of the captions


class TextAndUNet(torch.nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, tokenizer):
        super().__init__()
        self.text = models.clip_text(tokenizer, width=128, layers=3)
        self.unet = models.mvdream_unet()
        self.joint = join_views(self.unet)

    def forward(self, noisy, t, ids, cameras):
        """Noise (S, V, 4, h, w) in latents of S scenes; ids (S, L), cameras (S, V, 16), t (S, V)."""
        views = noisy.shape[1]
        words = self.text(ids).last_hidden_state.repeat_interleave(views, 0)
        out = self.unet(noisy.flatten(0, 1), t.flatten(), words, class_labels=cameras.flatten(0, 1)).sample
        return out.view_as(noisy)


def main() -> None:
    args = arguments(__doc__, minutes=14)
    folder = args.pack / "mvdream"
    tokenizer = clip_tokenizer_of(folder / "tokenizer" if args.tune else args.pack / "clip")
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(args.device).float().requires_grad_(False)
    count, cache = args.objects or 8_000, args.work / "pool_mvdream.pt"
    pool = render_pool(count, two_rings, models.MVDREAM_SIZE, args.device, args.seed + 2, cache=cache)
    n, views = pool.rgba.shape[:2]
    with torch.no_grad():
        parts = pool.rgba.flatten(0, 1).split(2048)
        encoded = [vae.encode(over_backdrop(p.float() / 255) * 2 - 1).latent_dist.mode() for p in parts]
        latents = torch.cat(encoded).view(n, views, 4, 16, 16) * vae.config.scaling_factor
    cameras = camera_embedding(pool.camera_to_world.flatten(0, 1)).view(n, views, 16)
    ids = tokens(tokenizer, pool.captions(CAPTIONS), args.device)
    empty = tokens(tokenizer, [[""]], args.device)[0, 0]
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    alphas = scheduler.alphas_cumprod.to(args.device)
    model = TextAndUNet(tokenizer)
    if args.tune:
        model.load_state_dict(
            {f"unet.{k}": v for k, v in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items()}
            | {f"text.{k}": v for k, v in load_file(folder / "text_encoder" / "model.safetensors").items()}
        )
    model.to(args.device)
    forward = {4: compiled(model, args), 8: compiled(model, args)}
    batch = args.batch or 128
    kinds, shares = list(KINDS), torch.tensor(list(KINDS.values()))

    def loss() -> torch.Tensor:
        kind = kinds[int(torch.multinomial(shares, 1))]
        shown = 4 if kind == "four" else 8
        scenes = batch if shown == 4 else batch // 2
        model.joint.views = shown
        i = torch.randint(n, (scenes,), device=args.device)
        first = 4 * int(torch.randint(2, ())) if shown == 4 else 0
        x0, camera = latents[i, first : first + shown], cameras[i, first : first + shown]
        words = ids[i, torch.randint(CAPTIONS, (scenes,), device=args.device)]
        dropped = torch.rand(scenes, 1, device=args.device) < DROPPED[kind]
        words = torch.where(dropped, empty, words)
        t = torch.randint(1000, (scenes, 1), device=args.device).repeat(1, shown)
        a = alphas[t].view(scenes, shown, 1, 1, 1)
        noise = torch.randn_like(x0)
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        drawn = slice(0, None)
        if kind == "known":
            drawn = slice(1, None)
            noisy[:, 0], t[:, 0] = x0[:, 0], 0
        with autocast(args):
            predicted = forward[shown](noisy, t, words, camera)
        return torch.mean((predicted.float() - noise)[:, drawn] ** 2)

    best, run = fit("mvdream", model, loss, args, lr=2e-4 if args.tune else 7e-4)
    best.unet.half().save_pretrained(folder / "unet")
    best.text.half().save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    forget_paths(folder)
    quality = {"noise_mse": run["final_loss"]}
    write_card(folder, "tiny-mvdream", "scripts/tiny_pack/train_mvdream.py", args, run, quality, background=BACKDROP)
    print(f"mvdream: {run}", flush=True)


if __name__ == "__main__":
    main()
