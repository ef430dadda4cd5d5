"""What every trainer of the pack shares: a loop bounded in minutes, averaged weights, resuming, and cards."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

LICENCE = "MIT"
# Of a run that another one started from.
KEPT = ("script", "seed", "device", "objects", "batch", "steps", "minutes", "final_loss")
ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
P = ParamSpec("P")
T = TypeVar("T")
MAX_SKIPPED = 20  # steps without finite gradients; beyond that a twentieth of all
PACK = Path(__file__).resolve().parents[2] / "generation" / "weights" / "tiny"


def arguments(description: str, minutes: float, more: dict[str, dict] | None = None) -> argparse.Namespace:
    """The trainers' arguments; `more` are one's own, as `add_argument` takes them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes, help="training time after the data is rendered")
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", help="with its data, from its start on: less of the minutes, then"
    )
    parser.add_argument("--pack", type=Path, default=PACK, help="where the pack's folders are")
    parser.add_argument("--work", type=Path, default=Path("data/tiny_pack"), help="where checkpoints are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--objects", type=int, help="objects to render (default: the trainer's own)")
    parser.add_argument("--batch", type=int, help="batch size (default: the trainer's own)")
    parser.add_argument("--tune", action="store_true", help="start from the pack's weights instead of from nothing")
    for name, about in (more or {}).items():
        parser.add_argument(name, **about)
    args = parser.parse_args()
    args.began = time.monotonic()
    torch.manual_seed(args.seed)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        # Its backward pass gives NaN on H100 and H200 since torch 2.11 (pytorch/pytorch#196678); the others do not.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return args


class Average:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0
        self._mine = [p for p in self.module.state_dict().values() if p.is_floating_point()]
        self._theirs = [p for p in module.state_dict().values() if p.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        weight = 1 - min(self.decay, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self._mine, self._theirs, weight)


def fit(
    name: str,
    module: ModuleT,
    loss: Callable[[], torch.Tensor],
    args: argparse.Namespace,
    lr: float,
    weight_decay: float = 0.01,
    decay: float = 0.999,
    until: float | None = None,
) -> tuple[ModuleT, dict[str, Any]]:
    """Minimise `loss()` (which draws its own batch) for `args.minutes`; the learning rate follows the clock.

    A checkpoint is kept every minute in `args.work`; a run that finds one goes on from it, with the time it had left.
    A step whose gradients are not finite is skipped and counted. More of them than MAX_SKIPPED and a twentieth of all
    raise FloatingPointError, with a checkpoint of what was trained.
    A run that is not done when the time is `until` (of `time.monotonic`) keeps one, and returns what it has. With
    `args.within` the minutes are no more than what is left of it, and the learning rate ends with them.
    Returns the averaged module and {"steps", "minutes", "final_loss"} for the card.
    """
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=args.device == "cuda"
    )
    # Its scale stays 1: it skips a step whose gradients are not finite, on the device and without waiting for it.
    scaler = torch.amp.GradScaler(args.device, init_scale=1.0)
    finite = torch.zeros((), dtype=torch.long, device=args.device)
    average = Average(module, decay)
    path = args.work / f"{name}.pt"
    args.work.mkdir(parents=True, exist_ok=True)
    step, spent, tried, skipped, failed = 0, 0.0, 0, 0, False
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        module.load_state_dict(state["module"])
        average.module.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, average.steps = state["step"], state["spent"], state["step"]
        print(f"{name}: resumed at step {step}, {spent / 60:.1f} min done", flush=True)
    budget, running = args.minutes * 60, None
    began = saved = shown = time.monotonic()
    if args.within is not None:
        budget = max(0.01, min(budget, spent + args.began + args.within - began))
    while True:
        elapsed = spent + time.monotonic() - began
        done = elapsed / budget
        ends = done >= 1 or (until is not None and time.monotonic() >= until)
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 200) * max(0.02, 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(optimiser)
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        scaler.step(optimiser)
        scaler.update(1.0)
        finite += torch.isfinite(norm)
        optimiser.zero_grad(set_to_none=True)
        average.update()
        step += 1
        tried += 1
        if step % 10 == 0:
            now, skipped = value.item(), tried - int(finite)
            failed = skipped > max(MAX_SKIPPED, tried / 20)
            if math.isfinite(now):
                running = now if running is None else 0.9 * running + 0.1 * now
        if time.monotonic() - shown > 20 or ends or failed:
            print(
                f"{name}: step {step}, {elapsed / 60:.1f}/{budget / 60:.1f} min, loss {running or value.item():.5f}"
                + (f", {skipped} steps skipped: gradients not finite" if skipped else ""),
                flush=True,
            )
            shown = time.monotonic()
        if time.monotonic() - saved > 60 or ends or failed:
            state = {
                "module": module.state_dict(),
                "average": average.module.state_dict(),
                "optimiser": optimiser.state_dict(),
            }
            torch.save(state | {"step": step, "spent": elapsed}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            saved = time.monotonic()
        if failed:
            raise FloatingPointError(
                f"{name}: the gradients of {skipped} of {tried} steps were not finite; {path} has what was trained"
            )
        if ends:
            final = running or value.item()
            averaged: ModuleT = average.module  # type: ignore[assignment]  # it is a copy of the module
            return averaged, {"steps": step, "minutes": round(elapsed / 60, 2), "final_loss": round(final, 5)}


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device, torch.bfloat16)


def compiled(function: Callable[P, T], args: argparse.Namespace) -> Callable[P, T]:
    return torch.compile(function, dynamic=False) if args.device == "cuda" else function


def write_card(
    folder: Path, name: str, script: str, args: argparse.Namespace, run: dict, quality: dict, **more
) -> None:
    """The model's card: where it comes from and what was measured of it (`quality` holds measured figures alone).

    A model that was tuned keeps the runs before, oldest first.
    """
    path = folder / "card.json"
    if args.tune:
        before = json.loads(path.read_text())
        more["started_from"] = [
            *before.get("started_from", []),
            {k: before[k] for k in KEPT if k in before},
        ]
        script = f"{script} --tune"
    card = {
        "name": name,
        "licence": LICENCE,
        "data": "procedural objects of scripts/tiny_pack (shapes.py, captions.py), rendered by render.py",
        "script": script,
        "seed": args.seed,
        "device": args.device,
        **{k: v for k, v in (("objects", args.objects), ("batch", args.batch)) if v is not None},
        **run,
        "quality": quality,
        **more,
    }
    path.write_text(json.dumps(card, indent=2) + "\n")


def forget_paths(folder: Path) -> None:
    """Take out of the configs below `folder` where on this machine the model was loaded from."""
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text())
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2) + "\n")


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(torch.mean((a.float() - b.float()) ** 2)))
