"""Train the pack's background removal (`python -m scripts.tiny_pack.train_background`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, interpolate

from . import matting_net, models
from .data import render_pool, two_rings
from .matting_net import MEAN, STD, MattingConfig, MattingNet
from .render import composite
from .training import arguments, autocast, compiled, fit, write_card


def backdrops(n: int, size: int, device: str) -> torch.Tensor:
    """(n, 3, size, size): mid grey, plain colours, gradients and soft blotches, with some noise."""
    plain = torch.rand(n, 3, 1, 1, device=device).expand(-1, -1, size, size)
    grey = torch.full_like(plain, 0.5)
    soft = interpolate(torch.rand(n, 3, 3, 3, device=device), size=size, mode="bicubic").clamp(0, 1)
    pick = torch.rand(n, 1, 1, 1, device=device)
    out = torch.where(pick < 0.5, grey, torch.where(pick < 0.75, plain, soft))
    return out + torch.randn(n, 3, size, size, device=device) * 0.03 * torch.rand(n, 1, 1, 1, device=device)


def main() -> None:
    args = arguments(__doc__, minutes=4)
    size = models.MATTING_SIZE
    pool = render_pool(args.objects or 1_000, two_rings, size, args.device, args.seed + 3)
    images = pool.rgba.flatten(0, 1)
    mean = torch.tensor(MEAN, device=args.device).view(3, 1, 1)
    std = torch.tensor(STD, device=args.device).view(3, 1, 1)
    net = MattingNet(MattingConfig()).to(args.device)
    batch = args.batch or 128

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        rgba = images[torch.randint(len(images), (n,), device=args.device)].float() / 255
        x = composite(rgba, backdrops(n, size, args.device)).clamp(0, 1)
        soft = interpolate(avg_pool2d(x, 2), size=size, mode="bilinear")  # what an upscaled 64-pixel view looks like
        x = torch.where(torch.rand(n, 1, 1, 1, device=args.device) < 0.4, soft, x)
        return (x - mean) / std, rgba[:, 3:]

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

    best, run = fit("background", net, loss, args, lr=2e-3)
    with torch.no_grad():
        x, alpha = draw(256)
        p = best(x)[-1].sigmoid()
        both = ((p > 0.5) & (alpha > 0.5)).flatten(1).sum(1)
        either = ((p > 0.5) | (alpha > 0.5)).flatten(1).sum(1).clamp_min(1)
        quality = {
            "iou": round(float((both / either).mean()), 4),
            "mean_abs_error": round(float((p - alpha).abs().mean()), 5),
        }
    folder = args.pack / "background"
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
