"""gsplat on this machine's GPU against our rasteriser for CPUs, in values and gradients.

    python -m scripts.tools.fidelity_gpu

Colours and alphas: largest difference, and the share of pixels that differ by more than 0.001 (a comparison that
float32 decides the other way changes a pixel by up to 1/255). Gradients: length of the difference over their length.
"""

from __future__ import annotations

import torch

from generation.splats.cameras import orbit
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize

GAUSSIANS, WIDTH, HEIGHT = 3000, 96, 80
LIMIT = 1e-3


def scene(coefficients: int) -> Gaussians:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    n = GAUSSIANS
    return Gaussians(0.4 * normal(n, 3), normal(n, 4), normal(n, 3) - 3.0, normal(n), 0.4 * normal(n, coefficients, 3))


def run(device: str, coefficients: int) -> dict[str, torch.Tensor]:
    cameras = orbit(torch.tensor([0.0, 30.0, -20.0]), torch.tensor([0.0, 100.0, 200.0]), 2.0, 49.1, WIDTH, HEIGHT)
    weights = torch.randn(3, HEIGHT, WIDTH, 4, generator=torch.Generator().manual_seed(1)).to(device)
    gaussians = scene(coefficients).to(device)
    for tensor in gaussians.tensors().values():
        tensor.requires_grad_()
    background = torch.tensor([0.2, 0.5, 0.9], device=device, requires_grad=True)
    rgb, alpha, info = rasterize(gaussians, cameras, WIDTH, HEIGHT, background)
    inputs = {**gaussians.tensors(), "background": background, "means2d": info["means2d"]}
    loss = (torch.cat([rgb, alpha], dim=-1) * weights).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    results = {"colours": rgb, "alphas": alpha, **dict(zip(inputs, gradients, strict=True))}
    return {name: value.detach().cpu() for name, value in results.items()}


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA GPU is needed")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {GAUSSIANS} Gaussians, 3 views")
    for degree, coefficients in enumerate((1, 4, 9, 16)):
        gpu, cpu = run("cuda", coefficients), run("cpu", coefficients)
        for name, value in cpu.items():
            difference = (gpu[name] - value).abs()
            if name in ("colours", "alphas"):
                share = float((difference > LIMIT).float().mean())
                print(f"degree {degree}, {name}: at most {float(difference.max()):.1e}; over {LIMIT:g}: {share:.1e}")
            else:
                print(f"degree {degree}, gradient by {name}: {float(difference.norm() / value.norm()):.1e}")


if __name__ == "__main__":
    main()
