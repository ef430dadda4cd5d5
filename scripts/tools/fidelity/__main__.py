"""Run the authors' own code and ours on the same random weights, and print how far apart the results are.

``.venv/bin/python -m scripts.tools.fidelity AUTHORS [--only NAME ...] [--golden]`` wants a folder with checkouts of the
public repositories that docs/FIDELITY.md lists. Their code is imported from there and none of it is kept. Packages that
it imports and the comparison does not use are replaced by stand-ins. ``--golden`` writes the tensors of tests/golden.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from scripts.tools.fidelity import background, dreamgaussian, lgm, multiview, zero123
from scripts.tools.fidelity.comparison import LIMIT, Comparison
from scripts.tools.fidelity.trellis import Trellis

CHECKS: tuple[Callable[[Comparison], None], ...] = (
    multiview.mvdream, multiview.mvdream_names, multiview.mvdream_cameras, multiview.imagedream,
    multiview.imagedream_names, multiview.views, zero123.zero123_unet, zero123.zero123_guidance, background.birefnet,
    dreamgaussian.cameras, dreamgaussian.learning_rates, lgm.lgm, lgm.lgm_names,
)  # fmt: skip


def trellis(comparison: Comparison) -> None:
    """All of TRELLIS, and its DINOv2."""
    t = Trellis(comparison)
    for check in (
        t.condition, t.structure_flow, t.structure_decoder, t.slat_flow, t.gaussian_decoder, t.sampler, t.whole,
        t.positions, t.names,
    ):  # fmt: skip
        check()


def main() -> int:
    checks = {check.__name__: check for check in (*CHECKS, trellis)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("authors", type=Path, help="folder with the checkouts")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=checks, help=f"only these: {', '.join(checks)}")
    parser.add_argument("--golden", action="store_true", help="write tests/golden anew")
    arguments = parser.parse_args()
    comparison = Comparison(arguments.authors.resolve(), arguments.golden)
    for name in arguments.only or checks:
        checks[name](comparison)
    print("| what | largest difference | largest value | spread |\n|---|---|---|---|")
    for what, difference, largest, spread in comparison.rows:
        print(f"| {what} | {difference:.1e} | {largest:.3g} | {'' if spread is None else f'{spread:.3g}'} |")
    worst = max(difference for _, difference, *_ in comparison.rows)
    print(f"\nlimit {LIMIT:.0e}: {'all within it' if worst < LIMIT else 'NOT within it'}")
    return 0 if worst < LIMIT and math.isfinite(worst) else 1


if __name__ == "__main__":
    np.random.seed(0)
    sys.exit(main())
