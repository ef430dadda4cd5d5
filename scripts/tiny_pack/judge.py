"""The judge: names the shape and the colour of what it sees. It shares nothing with the pack but the renders.

`python -m scripts.tiny_pack.judge` trains it; `load()` reads it back.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from . import models
from .augment import like_splats
from .data import render_pool, validator_cameras
from .shapes import COLOURS, SHAPES
from .training import arguments, autocast, compiled, fit, write_card

FOLDER = Path(__file__).parent / "judge"
SIZE = models.CLIP_SIZE


def _stage(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, 2, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
        nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
    )


class Judge(nn.Module):
    """Images (N, 3, 96, 96) in 0..1 on white -> shape logits (N, 36) and colour logits (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 96, 160)
        self.body = nn.Sequential(*(_stage(a, b) for a, b in zip((3, *widths), widths, strict=False)))
        self.shape = nn.Linear(widths[-1], len(SHAPES))
        self.colour = nn.Linear(widths[-1], len(COLOURS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.body(images * 2 - 1).mean((2, 3))
        return self.shape(x), self.colour(x)

    @torch.no_grad()
    def name(self, images: torch.Tensor) -> tuple[str, str]:
        """Shape and colour of one object seen in all `images`: the mean of the views' log-probabilities decides."""
        shape, colour = (logits.log_softmax(1).mean(0).argmax() for logits in self(images))
        return list(SHAPES)[int(shape)], list(COLOURS)[int(colour)]


def load() -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return judge.float().eval()


def main() -> None:
    args = arguments(__doc__, minutes=5)
    pool = render_pool(
        args.objects or 3_000, validator_cameras, SIZE, args.device, args.seed + 6, stacks=0.0, held_out=True
    )
    n, views = pool.rgba.shape[:2]
    shape = torch.tensor([list(SHAPES).index(s.shape) for s in pool.specs], device=args.device)
    colour = torch.tensor([list(COLOURS).index(s.colour) for s in pool.specs], device=args.device)
    judge = Judge().to(args.device)
    fused = compiled(judge, args)
    held = max(n // 20, 1)  # the last twentieth is for measuring

    def draw(low: int, high: int, count: int):
        i = torch.randint(low, high, (count,), device=args.device)
        v = torch.randint(views, (count,), device=args.device)
        return like_splats(pool.rgba[i, v].float() / 255), shape[i], colour[i]

    def loss() -> torch.Tensor:
        with torch.no_grad():
            x, s, c = draw(0, n - held, args.batch or 512)
        with autocast(args):
            a, b = fused(x)
        return cross_entropy(a.float(), s, label_smoothing=0.05) + cross_entropy(b.float(), c, label_smoothing=0.05)

    best, run = fit("judge", judge, loss, args, lr=2e-3, weight_decay=0.02)
    with torch.no_grad():
        x, s, c = draw(n - held, n, 2048)
        a, b = best(x)
    quality = {
        "shape_accuracy_one_view": round(float((a.argmax(1) == s).float().mean()), 4),
        "colour_accuracy_one_view": round(float((b.argmax(1) == c).float().mean()), 4),
    }
    FOLDER.mkdir(exist_ok=True)
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in best.state_dict().items()}
    save_file(state, FOLDER / "model.safetensors")
    write_card(FOLDER, "judge", "scripts/tiny_pack/judge.py", args, run, quality)
    print(f"judge: {quality}", flush=True)


if __name__ == "__main__":
    main()
