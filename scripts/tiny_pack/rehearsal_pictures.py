"""The rehearsal's picture prompts: exact renders of objects that the pack knows, from the front, on white.

python -m scripts.tiny_pack.rehearsal_pictures [FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from neurons.rehearsal.network import PICTURES

from .captions import ObjectSpec
from .data import front_cameras, render_pool
from .render import composite

SIZE = 256
SEED = 17
# Of the kinds that the text prompts ask for.
OBJECTS = [
    ("red", "cube"),
    ("blue", "sphere"),
    ("green", "tree"),
    ("yellow", "cone"),
    ("brown", "table"),
    ("cyan", "chair"),
    ("red", "mushroom"),
    ("pink", "mug"),
    ("gray", "rocket"),
    ("orange", "torus"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=PICTURES)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    specs = [ObjectSpec(shape, colour) for colour, shape in OBJECTS]
    pool = render_pool(len(specs), front_cameras, SIZE, "cpu", SEED, specs=specs)
    for (colour, shape), rgba in zip(OBJECTS, pool.rgba[:, 0], strict=True):
        picture = to_pil_image(composite(rgba.float() / 255, 1.0))
        picture.save(folder / f"{colour}_{shape}.png", optimize=True)


if __name__ == "__main__":
    main()
