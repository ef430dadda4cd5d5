"""A second opinion on quality, to tell whether the pack's quality net chose well: another network, seed and data.

One hidden layer on the judge's features, for a vision transformer needs more results than a CPU makes. It learns as the
quality net does (`train_quality.py`), but from results that the quality net has not seen: `results.py` makes others for
another seed. It is no part of the pack.

    python -m scripts.tiny_pack.results --work FOLDER --seed 1
    python -m scripts.tiny_pack.referee --work FOLDER --out referee.safetensors
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import judge
from .measure_quality import exemplars_margin, logits, measure
from .results import CALIBRATION, UNSEEN
from .train_quality import Sampler, exact_pool, exact_renders, label, load_results, objective, scale_of
from .training import arguments, fit

SIZE = 112  # pixels


class Referee(nn.Module):
    """Views (N, 3, S, S) in 0..1 on white -> logits (N,) of their quality; a splat's score is their sigmoids' mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = judge.Judge().body
        features = 3 * sum(stage[0].out_channels for stage in self.body)  # type: ignore[index, misc]
        self.norm = nn.BatchNorm1d(features, affine=False)
        self.head = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(features, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 1)
        )

    def train(self, mode: bool = True) -> Referee:
        super().train(mode)
        self.body.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 984) of views (N, 3, S, S): means, maxima and deviations of the judge's four stages."""
        x = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True) * 2 - 1
        pooled = []
        for stage in self.body:
            x = stage(x)
            pooled += [x.mean((2, 3)), x.amax((2, 3)), x.std((2, 3))]
        return torch.cat(pooled, 1)

    def of_features(self, features: Tensor) -> Tensor:
        return self.head(self.norm(features)).squeeze(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.of_features(self.features(images))

    @torch.no_grad()
    def score(self, views: Tensor) -> float:
        """Of one splat, in 0..1, from the validators' views (V, 3, S, S) in 0..1."""
        return float(self(views.float()).sigmoid().mean())


def load(path: Path) -> Referee:
    referee = Referee()
    referee.load_state_dict(load_file(path))
    return referee.eval().requires_grad_(False)


def main() -> None:
    args = arguments(
        __doc__,
        minutes=12,
        more={"--out": {"type": Path, "required": True}, "--tests": {"type": Path, "help": "other results' folder"}},
    )
    records = load_results(args.work / "results", "train")
    tests, others = (load_results((args.tests or args.work) / "results", split) for split in ("test", "calibration"))
    margin, scale = exemplars_margin(others), scale_of(others)
    label(records, scale)
    sampler = Sampler(records, exact_pool(args, args.objects or 400), margin, args.device)
    referee = Referee()
    referee.body.load_state_dict(judge.load().body.state_dict())
    referee.body.requires_grad_(False)
    referee.to(args.device).train()
    features, worths, began = [], [], time.monotonic()
    while time.monotonic() - began < args.minutes * 60:  # the body stays as it is, so it looks at each pair once
        x, worth = sampler.draw(24)
        features.append(referee.features(x.flatten(0, 2)).unflatten(0, worth.shape))
        worths.append(worth)
    bank, bank_worth = torch.cat(features, 1), torch.cat(worths, 1)
    print(f"referee: {bank.shape[1]} pairs", flush=True)

    def loss() -> Tensor:
        some = torch.randint(bank.shape[1], (args.batch or 64,), device=args.device)
        return objective(referee.of_features, bank[:, some], bank_worth[:, some])

    args.minutes *= 0.3
    best, run = fit("referee", referee, loss, args, lr=1e-3, weight_decay=1.0, decay=0.98)
    best.eval()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    state = {name: v.half() if v.is_floating_point() else v for name, v in best.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, args.out)
    tested = logits(best, torch.stack([r["views"] for r in tests]))
    quality, _ = measure(tests, tested, logits(best, exact_renders(UNSEEN, 2, args.device)), margin, args.seed)
    about = {
        "seed": args.seed,
        **run,
        "records": len(records),
        "quality": quality,
        "never_saw": [*UNSEEN, *CALIBRATION],
    }
    args.out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
