"""Train the pack's text-to-image model, a FLUX of four steps or two (`python -m scripts.tiny_pack.train_flux`).

Rectified flow (Liu et al. 2022) on front views, trained at the very noise levels that the 1-, 2- and 4-step samplers
visit: with captions that all but determine the picture, no distillation is needed on top. As in FLUX, the CLIP text
encoder is a trained one (the pack's own) and stays as it is.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, T5TokenizerFast

from . import models
from .data import front_cameras, render_pool
from .render import composite
from .text import MAX_TOKENS, T5_TOKENS, clip_tokenizer_of, t5_tokenizer
from .training import arguments, autocast, compiled, fit, forget_paths, write_card

CAPTIONS = 6
GREY = 0.5


class TextAndTransformer(torch.nn.Module):
    """The T5 encoder and the transformer, trained together; CLIP's pooled text comes in ready."""

    def __init__(self, t5_tok):
        super().__init__()
        self.t5 = models.t5_text(t5_tok)
        self.transformer = models.flux_transformer()
        ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(T5_TOKENS, 3), persistent=False)

    def forward(self, packed, sigma, pooled, t5_ids):
        return self.transformer(
            hidden_states=packed,
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=self.t5(t5_ids).last_hidden_state,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


def tokens(tokenizer, texts: list[list[str]], device: str, length: int = MAX_TOKENS) -> torch.Tensor:
    """Ids (N, ways, length) of `ways` captions for each of N objects."""
    flat = [t for ways in texts for t in ways]
    ids = tokenizer(flat, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids.view(len(texts), -1, length).to(device)


@torch.no_grad()
def unseen(
    model: TextAndTransformer, x0: torch.Tensor, pooled: torch.Tensor, t5_ids: torch.Tensor, levels: torch.Tensor
) -> dict[str, float]:
    """Mean squared error of the velocity at each noise level, of objects that training did not see."""
    noise = torch.randn_like(x0)
    found = {}
    for level in levels:
        velocity = [
            model((1 - level) * a + level * b, level.expand(len(a)), pool, ids)
            for a, b, pool, ids in zip(*(t.split(128) for t in (x0, noise, pooled, t5_ids)), strict=True)
        ]
        found[f"{float(level):g}"] = round(float(torch.mean((torch.cat(velocity) - (noise - x0)) ** 2)), 5)
    return found


def main() -> None:
    args = arguments(__doc__, minutes=12, more={"--lr": {"type": float, "help": "the highest learning rate"}})
    folder = args.pack / "flux"
    # With --tune FLUX keeps the tower that it was trained with: the CLIP of the pack may be a newer one.
    clip_tok = clip_tokenizer_of(folder / "tokenizer" if args.tune else args.pack / "clip")
    t5_tok = T5TokenizerFast.from_pretrained(folder / "tokenizer_2") if args.tune else t5_tokenizer()
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(args.device).float().requires_grad_(False)
    if args.tune:
        clip = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
    else:
        clip = models.clip_text_of(load_file(args.pack / "clip" / "open_clip_model.safetensors"), clip_tok)
    clip.to(args.device).requires_grad_(False)
    count, cache = args.objects or 12_000, args.work / "pool_flux.pt"
    pool = render_pool(count, front_cameras, models.FLUX_SIZE, args.device, args.seed + 1, cache=cache)
    texts = pool.captions(CAPTIONS)
    t5_ids = tokens(t5_tok, texts, args.device, T5_TOKENS)
    with torch.no_grad():
        clip_ids = tokens(clip_tok, texts, args.device).flatten(0, 1).split(1024)
        pooled = torch.cat([clip(ids).pooler_output for ids in clip_ids]).view(len(pool), CAPTIONS, -1)
    with torch.no_grad():
        packed = []
        for part in pool.rgba[:, 0].split(512):
            z = vae.encode(composite(part.float() / 255, GREY) * 2 - 1).latent_dist.mode()
            z = (z - vae.config.shift_factor) * vae.config.scaling_factor
            packed.append(FluxPipeline._pack_latents(z, len(z), 16, 16, 16))
        latents = torch.cat(packed)
    model = TextAndTransformer(t5_tok)
    if args.tune:
        transformer = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        model.transformer.load_state_dict(transformer)
        model.t5.load_state_dict(load_file(folder / "text_encoder_2" / "model.safetensors"), strict=False)
    model.to(args.device)
    forward = compiled(model, args)
    batch = args.batch or 512
    visited = torch.tensor([1.0, 0.75, 0.5, 0.25], device=args.device)
    held = max(len(latents) // 20, 1)  # the last twentieth is for measuring

    def loss() -> torch.Tensor:
        i = torch.randint(len(latents) - held, (batch,), device=args.device)
        way = torch.randint(CAPTIONS, (batch,), device=args.device)
        x0, noise = latents[i], torch.randn_like(latents[i])
        sigma = visited[torch.multinomial(visited.new_tensor([0.4, 0.2, 0.2, 0.2]), batch, replacement=True)]
        sigma = torch.where(torch.rand(batch, device=args.device) < 0.25, torch.rand(batch, device=args.device), sigma)
        noisy = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * noise
        with autocast(args):
            velocity = forward(noisy, sigma, pooled[i, way], t5_ids[i, way])
        return torch.mean((velocity.float() - (noise - x0)) ** 2)

    best, run = fit("flux", model, loss, args, lr=args.lr or (4e-4 if args.tune else 8e-4))
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tok,
        text_encoder_2=best.t5,
        tokenizer_2=t5_tok,
        transformer=best.transformer,
    )
    quality = {"velocity_mse_unseen": unseen(best, latents[-held:], pooled[-held:, 0], t5_ids[-held:, 0], visited)}
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    forget_paths(folder)
    write_card(folder, "tiny-flux", "scripts/tiny_pack/train_flux.py", args, run, quality)
    print(f"flux: {run}", flush=True)


if __name__ == "__main__":
    main()
