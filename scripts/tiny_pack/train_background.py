"""Train the pack's background removal (`python -m scripts.tiny_pack.train_background`).

It learns from exact renders on many backdrops and, since that is what it is given most, from such pictures as the
pack's own FLUX draws: on grey, and through its autoencoder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.nn.functional import affine_grid, avg_pool2d, binary_cross_entropy_with_logits, grid_sample, interpolate

from . import matting_net, models
from .data import front_cameras, render_pool, two_rings
from .matting_net import MEAN, STD, MattingConfig, MattingNet
from .render import composite
from .train_vae import GREY, LATENT_NOISE
from .training import arguments, autocast, compiled, fit, write_card

DECODED = 0.4  # share of pictures that went through FLUX's autoencoder
SMALLER = 0.3  # share of the others whose object is smaller than renders have it, and anywhere
LEAST = 0.25  # of its size


def backdrops(n: int, size: int, device: str) -> torch.Tensor:
    """(n, 3, size, size): mid grey, plain colours, gradients and soft blotches, with some noise."""
    plain = torch.rand(n, 3, 1, 1, device=device).expand(-1, -1, size, size)
    grey = torch.full_like(plain, 0.5)
    soft = interpolate(torch.rand(n, 3, 3, 3, device=device), size=size, mode="bicubic").clamp(0, 1)
    pick = torch.rand(n, 1, 1, 1, device=device)
    out = torch.where(pick < 0.5, grey, torch.where(pick < 0.75, plain, soft))
    return out + torch.randn(n, 3, size, size, device=device) * 0.03 * torch.rand(n, 1, 1, 1, device=device)


def made_smaller(rgba: torch.Tensor) -> torch.Tensor:
    """Premultiplied RGBA (n, 4, S, S) of which some show the object smaller, somewhere in the frame."""
    n = len(rgba)
    scale = LEAST + (1 - LEAST) * torch.rand(n, device=rgba.device)
    scale = torch.where(torch.rand(n, device=rgba.device) < SMALLER, scale, 1.0)
    matrix = torch.zeros(n, 2, 3, device=rgba.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, :, 2] = (2 * torch.rand(n, 2, device=rgba.device) - 1) * (1 / scale - 1)[:, None]
    return grid_sample(rgba, affine_grid(matrix, list(rgba.shape), align_corners=False), align_corners=False)


@torch.no_grad()
def decoded(vae: AutoencoderKL, rgba: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, S, S) of RGBA bytes (n, 4, S, S), as FLUX shows them: its latents are never quite exact."""
    pictures = []
    for part in rgba.split(64):
        z = vae.encode(composite(part.float() / 255, GREY) * 2 - 1).latent_dist.mode()
        off = 2 * LATENT_NOISE * torch.rand(len(z), 1, 1, 1, device=z.device) * z.std() * torch.randn_like(z)
        pictures.append((vae.decode(z + off).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(pictures)


def main() -> None:
    args = arguments(__doc__, minutes=4)
    size, folder = models.MATTING_SIZE, args.pack / "background"
    pool = render_pool(args.objects or 1_000, two_rings, size, args.device, args.seed + 3)
    images = pool.rgba.flatten(0, 1)
    front = render_pool(args.objects or 4_000, front_cameras, size, args.device, args.seed + 4).rgba[:, 0]
    vae = AutoencoderKL.from_pretrained(args.pack / "flux" / "vae").to(args.device).float().requires_grad_(False)
    drawn = (decoded(vae, front) * 255).round().to(torch.uint8)
    held = max(len(front) // 20, 1)  # the last twentieth is for measuring
    mean = torch.tensor(MEAN, device=args.device).view(3, 1, 1)
    std = torch.tensor(STD, device=args.device).view(3, 1, 1)
    net = MattingNet(MattingConfig())
    if args.tune:
        net.load_state_dict(load_file(folder / "model.safetensors"))
    net.to(args.device)
    batch = args.batch or 128

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        rgba = made_smaller(images[torch.randint(len(images), (n,), device=args.device)].float() / 255)
        x = composite(rgba, backdrops(n, size, args.device)).clamp(0, 1)
        soft = interpolate(avg_pool2d(x, 2), size=size, mode="bilinear")  # what an upscaled 64-pixel view looks like
        x = torch.where(torch.rand(n, 1, 1, 1, device=args.device) < 0.4, soft, x)
        alpha = rgba[:, 3:]
        i = torch.randint(len(front) - held, (int(DECODED * n),), device=args.device)
        x[: len(i)], alpha[: len(i)] = drawn[i].float() / 255, front[i, 3:].float() / 255
        return (x - mean) / std, alpha

    def objective(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        total = x.new_zeros(())
        for logits in net(x):
            target = avg_pool2d(alpha, size // logits.shape[-1])
            p = logits.sigmoid()
            overlap = 1 - 2 * (p * target).sum() / ((p + target).sum() + 1)
            total = total + binary_cross_entropy_with_logits(logits, target) + 0.2 * overlap
        return total

    fused = compiled(objective, args)

    def loss() -> torch.Tensor:
        with autocast(args):
            return fused(*draw(batch))

    @torch.no_grad()
    def measured(x: torch.Tensor, alpha: torch.Tensor) -> dict[str, float]:
        p = torch.cat([best((part - mean) / std)[-1].sigmoid() for part in x.split(64)])
        both = ((p > 0.5) & (alpha > 0.5)).flatten(1).sum(1)
        either = ((p > 0.5) | (alpha > 0.5)).flatten(1).sum(1).clamp_min(1)
        return {
            "iou": round(float((both / either).mean()), 4),
            "mean_abs_error": round(float((p - alpha).abs().mean()), 5),
        }

    best, run = fit("background", net, loss, args, lr=5e-4 if args.tune else 2e-3)
    unseen, alpha = front[-held:].float() / 255, front[-held:, 3:].float() / 255
    quality = {
        "on_grey": measured(composite(unseen, GREY), alpha),
        "on_white": measured(composite(unseen, 1.0), alpha),
        "through_autoencoder": measured(drawn[-held:].float() / 255, alpha),
    }
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(matting_net.__file__), folder / "matting_net.py")
    config = {
        "architectures": ["MattingNet"],
        "auto_map": {
            "AutoConfig": "matting_net.MattingConfig",
            "AutoModelForImageSegmentation": "matting_net.MattingNet",
        },
        "model_type": MattingConfig.model_type,
        "widths": best.config.widths,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in best.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    write_card(folder, "tiny-background", "scripts/tiny_pack/train_background.py", args, run, quality)
    print(f"background: {quality}", flush=True)


if __name__ == "__main__":
    main()
