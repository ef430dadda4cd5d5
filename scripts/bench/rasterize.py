"""Measure the rasteriser on this machine: `python scripts/bench/rasterize.py` (on the GPU when there is one).

The scene is a ball of Gaussians, radius 0.5, seen by cameras all round at distance 2. The first line is the time to
compile the CPU kernels, or to load them where they were compiled before.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from generation.splats.cameras import orbit
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize, warm_up

CASES = [  # Gaussians, harmonics' coefficients, views, pixels, standard deviation, backwards too
    (10_000, 1, 5, 64, 0.02, True),
    (10_000, 16, 5, 64, 0.02, True),
    (20_000, 1, 5, 64, 0.015, True),
    (10_000, 1, 5, 128, 0.02, True),
    (20_000, 1, 5, 128, 0.015, True),
    (10_000, 1, 16, 224, 0.02, False),
    (50_000, 1, 16, 224, 0.01, False),
    (500_000, 1, 16, 224, 0.005, False),
]
SECONDS = 4.0  # for each case


def ball(n: int, coefficients: int, deviation: float, device: str) -> Gaussians:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    means = torch.nn.functional.normalize(normal(n, 3), dim=1) * 0.5 * torch.rand(n, 1, generator=g) ** (1 / 3)
    log_scales = torch.tensor(deviation).log() + 0.3 * normal(n, 3)
    return Gaussians(means, normal(n, 4), log_scales, normal(n), 0.3 * normal(n, coefficients, 3)).to(device)


def measure(case: tuple[int, int, int, int, float, bool], device: str) -> list[float]:
    """Milliseconds of each run, the warming ones left out."""
    n, coefficients, views, size, deviation, backwards = case
    gaussians = ball(n, coefficients, deviation, device)
    cameras = orbit(torch.linspace(-30, 30, views), torch.arange(views) * 360.0 / views, 2.0, 49.1, size, size).to(
        device
    )
    background = torch.ones(3, device=device)
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_(backwards)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        with torch.set_grad_enabled(backwards):
            rgb, alpha, _ = rasterize(gaussians, cameras, size, size, background)
        if backwards:
            torch.autograd.backward([rgb, alpha], [rgb.detach(), alpha.detach()])
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times[2:]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    warm_up()
    print(
        f"CPU kernels ready after {time.perf_counter() - start:.1f} s; {torch.get_num_threads()} threads, on {device}"
    )
    print("Gaussians  SH  views  pixels  pass              median ms  fastest ms")
    for case in CASES:
        n, coefficients, views, size, _, backwards = case
        times = sorted(measure(case, device))
        kind = "forward, backward" if backwards else "forward"
        print(
            f"{n:9,}  {coefficients:2}  {views:5}  {size:6}  {kind:17} {times[len(times) // 2]:10.1f} {times[0]:11.1f}"
        )


if __name__ == "__main__":
    main()
