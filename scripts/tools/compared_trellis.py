"""Whether TRELLIS computes on a GPU what it does on a CPU: ``.venv/bin/python -m scripts.tools.compared_trellis``.

Narrow ones with random weights, eager and compiled, in 32 and 16 bits, against a CPU's float32. ``cpu`` as an argument
tries the same there, without a compiler, and without the structure decoder in 16 bits, which takes minutes.
"""

from __future__ import annotations

import copy
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from generation.generators.trellis.gaussian_decoder import GaussianDecoder
from generation.generators.trellis.generator import compile_blocks
from generation.generators.trellis.slat_flow import SlatFlow
from generation.generators.trellis.sparse import Voxels
from generation.generators.trellis.structure_decoder import StructureDecoder
from generation.generators.trellis.structure_flow import StructureFlow
from generation.generators.trellis.weights import build, prepare
from scripts.bench.trellis_sizes import PUBLISHED

WIDTH = 128
NARROW: dict[Any, dict[str, Any]] = {
    StructureFlow: {"model_channels": WIDTH, "cond_channels": WIDTH, "num_blocks": 2, "num_heads": 2},
    StructureDecoder: {"channels": [64, 32, 16]},
    SlatFlow: {"model_channels": WIDTH, "cond_channels": WIDTH, "num_blocks": 2, "num_heads": 2},
    GaussianDecoder: {"model_channels": WIDTH, "num_blocks": 2, "num_heads": 2},
}


def inputs() -> dict[str, Tensor]:
    """Two samples: their noise, their pictures' features, and voxels in the shape of shells."""
    axis = torch.arange(64) - 32.0
    radii = torch.cartesian_prod(axis, axis, axis).norm(dim=1).view(64, 64, 64)
    shells = [torch.argwhere((radii - radius).abs() < 0.6) for radius in (12, 9)]
    return {
        "noise": torch.randn(2, 8, 16, 16, 16),
        "features": torch.randn(2, 77, WIDTH),
        "t": torch.tensor([900.0, 300.0]),
        "large": shells[0],
        "small": shells[1],
        "latents": torch.randn(sum(map(len, shells)), 8),
    }


@torch.no_grad()
def run(kind: Any, network: Any, given: dict[str, Tensor]) -> Tensor:
    """Its output; of a flow for both samples with their pictures, and for one without."""
    voxels = [Voxels.of(given[name], 64) for name in ("large", "small")]
    both, doubled = Voxels.join(voxels), Voxels.join([*voxels, voxels[0]])
    if kind is StructureDecoder:
        return network(given["noise"])
    if kind is GaussianDecoder:
        made = network(given["latents"], both.fine)
        return torch.cat([torch.cat([each.means, each.colours, each.scales, each.quats], 1) for each in made])
    contexts = [network.project_context(features) for features in given["features"]]
    if kind is StructureFlow:
        return network(given["noise"], given["t"], contexts, 1)
    return network(given["latents"], given["t"], contexts, both, doubled)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    torch.manual_seed(0)
    given = inputs()
    there = {name: tensor.to(device) for name, tensor in given.items()}
    for kind, narrow in NARROW.items():
        network: Any = build(kind, PUBLISHED[kind] | narrow)
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and not name.endswith("gamma"):
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        true = run(kind, prepare(network, torch.float32), given)
        flow = kind in (StructureFlow, SlatFlow)
        for dtype in (torch.float32, torch.float16):
            for compiled in (False, True) if flow and device != "cpu" else (False,):
                if device == "cpu" and kind is StructureDecoder and dtype == torch.float16:
                    continue
                other = prepare(copy.deepcopy(network).to(device), dtype)
                if compiled:
                    compile_blocks(other.blocks)
                started = time.perf_counter()
                difference = float((run(kind, other, there).cpu() - true).abs().max() / true.std())
                what = f"{kind.__name__}, {dtype}{', compiled' if compiled else ''}"
                print(f"{what}: {difference:.1e} of the deviation ({time.perf_counter() - started:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
