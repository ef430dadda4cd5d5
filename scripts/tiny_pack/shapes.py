"""Procedural objects as unions of signed-distance primitives.

An object is at most `MAX_PRIMITIVES` primitives in its own frame: y up, front to +z, about two units across.
Signed distances follow I. Quilez, "Distance functions" (https://iquilezles.org/articles/distfunctions/).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MAX_PRIMITIVES = 9

# Primitive kinds and what their four size numbers mean (lengths in object units).
ELLIPSOID = 0  # radius x, radius y, radius z, unused
BOX = 1  # half x, half y, half z, edge radius
FRUSTUM = 2  # bottom radius, half height, top radius, unused
TORUS = 3  # ring radius, tube radius, unused, unused (axis y)
PRISM = 4  # bottom apothem, half height, top apothem, number of sides
CUP = 5  # bottom radius, half height, top radius, wall
DOME = 6  # upper half of an ellipsoid: radius x, radius y, radius z, unused

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.12, 0.60, 0.15),
    "blue": (0.10, 0.22, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "orange": (0.97, 0.50, 0.06),
    "purple": (0.48, 0.12, 0.68),
    "pink": (0.98, 0.48, 0.70),
    "cyan": (0.10, 0.80, 0.88),
    "brown": (0.42, 0.24, 0.11),
    "white": (0.94, 0.94, 0.94),
    "black": (0.07, 0.07, 0.07),
    "gray": (0.33, 0.33, 0.34),
}
MATERIALS = ("matte", "shiny", "metallic")

# Fixed colours of the parts that a caption's colour does not reach.
WOOD = (0.45, 0.28, 0.14)
CREAM = (0.93, 0.87, 0.74)
DARK = (0.15, 0.15, 0.17)
STEEL = (0.62, 0.65, 0.70)
GLASS = (0.55, 0.80, 0.92)
LEAF = (0.16, 0.55, 0.20)
CARROT = (0.98, 0.50, 0.10)


@dataclass(frozen=True)
class Primitive:
    """One solid. `colour` None takes the caption's colour; `tilt` turns about x, then `turn` about z (degrees)."""

    kind: int
    size: tuple[float, float, float, float]
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    colour: tuple[float, float, float] | None = None
    tilt: float = 0.0
    turn: float = 0.0


def _ball(r: float, centre=(0.0, 0.0, 0.0), colour=None) -> Primitive:
    return Primitive(ELLIPSOID, (r, r, r, 0), centre, colour)


def _oval(size, centre=(0.0, 0.0, 0.0), colour=None, **turn) -> Primitive:
    return Primitive(ELLIPSOID, (*size, 0), centre, colour, **turn)


def _box(half, centre=(0.0, 0.0, 0.0), colour=None, edge=0.02, **turn) -> Primitive:
    return Primitive(BOX, (*half, edge), centre, colour, **turn)


def _rod(bottom, height, top=None, centre=(0.0, 0.0, 0.0), colour=None, **turn) -> Primitive:
    return Primitive(FRUSTUM, (bottom, height / 2, bottom if top is None else top, 0), centre, colour, **turn)


def _ring(ring, tube, centre=(0.0, 0.0, 0.0), colour=None, **turn) -> Primitive:
    return Primitive(TORUS, (ring, tube, 0, 0), centre, colour, **turn)


def _prism(bottom, height, top, sides, centre=(0.0, 0.0, 0.0), colour=None, **turn) -> Primitive:
    return Primitive(PRISM, (bottom, height / 2, top, sides), centre, colour, **turn)


def _cup(bottom, height, top, wall, centre=(0.0, 0.0, 0.0), colour=None) -> Primitive:
    return Primitive(CUP, (bottom, height / 2, top, wall), centre, colour)


def _dome(size, centre=(0.0, 0.0, 0.0), colour=None, **turn) -> Primitive:
    return Primitive(DOME, (*size, 0), centre, colour, **turn)


def _corners(x: float, z: float) -> list[tuple[float, float]]:
    return [(-x, -z), (-x, z), (x, -z), (x, z)]


def _table() -> list[Primitive]:
    legs = [_box((0.09, 0.5, 0.09), (x, -0.25, z)) for x, z in _corners(0.72, 0.5)]
    return [_box((0.95, 0.09, 0.7), (0, 0.33, 0)), *legs]


def _chair() -> list[Primitive]:
    legs = [_box((0.08, 0.42, 0.08), (x, -0.6, z)) for x, z in _corners(0.42, 0.42)]
    return [_box((0.55, 0.08, 0.55), (0, -0.12, 0)), _box((0.55, 0.55, 0.08), (0, 0.5, -0.47)), *legs]


def _car() -> list[Primitive]:
    wheels = [_rod(0.25, 0.16, centre=(x, -0.32, z), colour=DARK, tilt=90) for x, z in _corners(0.6, 0.42)]
    return [
        _box((1.0, 0.22, 0.45), (0, -0.1, 0), edge=0.1),
        _box((0.5, 0.2, 0.38), (-0.08, 0.28, 0), edge=0.1),
        _box((0.42, 0.1, 0.395), (-0.08, 0.28, 0), GLASS),
        *wheels,
    ]


def _robot() -> list[Primitive]:
    return [
        _box((0.42, 0.42, 0.28), (0, 0, 0), edge=0.05),
        _box((0.28, 0.22, 0.24), (0, 0.7, 0), edge=0.05),
        _ball(0.07, (-0.12, 0.74, 0.23), GLASS),
        _ball(0.07, (0.12, 0.74, 0.23), GLASS),
        _rod(0.03, 0.25, centre=(0, 1.03, 0), colour=STEEL),
        _box((0.1, 0.36, 0.12), (-0.56, 0.02, 0), STEEL),
        _box((0.1, 0.36, 0.12), (0.56, 0.02, 0), STEEL),
        _box((0.13, 0.3, 0.16), (-0.22, -0.7, 0), STEEL),
        _box((0.13, 0.3, 0.16), (0.22, -0.7, 0), STEEL),
    ]


def _flower() -> list[Primitive]:
    around = [(0.38 * math.cos(a), 0.5 + 0.38 * math.sin(a)) for a in (k * math.tau / 6 for k in range(6))]
    petals = [_oval((0.22, 0.22, 0.1), (x, y, 0)) for x, y in around]
    return [
        *petals,
        _oval((0.24, 0.24, 0.16), (0, 0.5, 0), (0.97, 0.8, 0.15)),
        _rod(0.06, 1.3, centre=(0, -0.45, -0.03), colour=LEAF),
        _oval((0.3, 0.09, 0.12), (0.25, -0.55, 0), LEAF, turn=30),
    ]


def _castle() -> list[Primitive]:
    teeth = [_box((0.15, 0.15, 0.15), (x, 0.92, z)) for x, z in _corners(0.38, 0.38)]
    return [
        _rod(0.55, 1.5, centre=(0, -0.15, 0)),
        _rod(0.66, 0.3, centre=(0, 0.68, 0)),
        *teeth,
        _box((0.17, 0.3, 0.1), (0, -0.6, 0.5), DARK),
    ]


def _bed() -> list[Primitive]:
    feet = [_box((0.07, 0.14, 0.07), (x, -0.4, z), WOOD) for x, z in _corners(0.88, 0.52)]
    return [
        _box((0.98, 0.14, 0.6), (0, -0.16, 0), edge=0.05),
        _box((0.06, 0.5, 0.6), (-0.98, 0.06, 0), WOOD),
        _box((0.2, 0.1, 0.4), (-0.66, 0.06, 0), CREAM, edge=0.08),
        *feet,
    ]


def _sofa() -> list[Primitive]:
    return [
        _box((0.95, 0.2, 0.45), (0, -0.25, 0), edge=0.08),
        _box((0.95, 0.42, 0.16), (0, 0.1, -0.38), edge=0.1),
        _box((0.17, 0.36, 0.45), (-0.9, -0.1, 0), edge=0.1),
        _box((0.17, 0.36, 0.45), (0.9, -0.1, 0), edge=0.1),
    ]


def _cactus() -> list[Primitive]:
    return [
        _oval((0.26, 0.85, 0.26), (0, 0.15, 0)),
        _rod(0.12, 0.5, centre=(0.38, 0.1, 0), turn=90),
        _oval((0.13, 0.38, 0.13), (0.58, 0.32, 0)),
        _rod(0.12, 0.5, centre=(-0.38, -0.15, 0), turn=90),
        _oval((0.13, 0.38, 0.13), (-0.58, 0.1, 0)),
        _rod(0.32, 0.42, 0.42, (0, -0.82, 0), (0.72, 0.36, 0.2)),
    ]


def _airplane() -> list[Primitive]:
    return [
        _oval((1.05, 0.2, 0.2)),
        _box((0.2, 0.04, 1.0), (0.05, 0.0, 0)),
        _box((0.11, 0.04, 0.4), (-0.88, 0.05, 0), STEEL),
        _box((0.13, 0.25, 0.04), (-0.88, 0.25, 0)),
        _oval((0.2, 0.1, 0.14), (0.6, 0.13, 0), GLASS),
    ]


# The catalogue: shape name -> its primitives. Names are the judge's classes.
SHAPES: dict[str, Callable[[], list[Primitive]]] = {
    "cube": lambda: [_box((0.75, 0.75, 0.75))],
    "sphere": lambda: [_ball(0.9)],
    "cylinder": lambda: [_rod(0.55, 1.7)],
    "cone": lambda: [_rod(0.8, 1.7, 0.01)],
    "torus": lambda: [_ring(0.7, 0.27)],
    "pyramid": lambda: [_prism(0.85, 1.4, 0.01, 4)],
    "mug": lambda: [_cup(0.55, 1.3, 0.55, 0.1), _ring(0.38, 0.1, (0.6, 0, 0), tilt=90)],
    "bowl": lambda: [_cup(0.35, 0.8, 0.95, 0.1)],
    "chair": _chair,
    "table": _table,
    "sofa": _sofa,
    "bed": _bed,
    "lamp": lambda: [
        _rod(0.62, 0.75, 0.32, (0, 0.6, 0)),
        _rod(0.06, 1.3, centre=(0, -0.25, 0), colour=STEEL),
        _rod(0.45, 0.12, centre=(0, -0.9, 0), colour=DARK),
    ],
    "mushroom": lambda: [_dome((0.9, 0.65, 0.9), (0, 0.15, 0)), _rod(0.34, 1.0, 0.26, (0, -0.3, 0), CREAM)],
    "tree": lambda: [
        _rod(0.75, 0.8, 0.05, (0, -0.15, 0)),
        _rod(0.6, 0.7, 0.04, (0, 0.3, 0)),
        _rod(0.42, 0.6, 0.01, (0, 0.75, 0)),
        _rod(0.16, 0.6, centre=(0, -0.75, 0), colour=WOOD),
    ],
    "cactus": _cactus,
    "flower": _flower,
    "snowman": lambda: [
        _ball(0.58, (0, -0.5, 0)),
        _ball(0.42, (0, 0.3, 0)),
        _ball(0.28, (0, 0.86, 0)),
        _rod(0.07, 0.35, 0.01, (0, 0.86, 0.4), CARROT, tilt=90),
        _rod(0.24, 0.3, centre=(0, 1.2, 0), colour=DARK),
        _rod(0.36, 0.05, centre=(0, 1.06, 0), colour=DARK),
    ],
    "robot": _robot,
    "rocket": lambda: [
        _rod(0.36, 1.3, centre=(0, -0.1, 0)),
        _rod(0.36, 0.7, 0.01, (0, 0.9, 0), CREAM),
        _box((0.75, 0.28, 0.05), (0, -0.65, 0), STEEL),
        _box((0.05, 0.28, 0.75), (0, -0.65, 0), STEEL),
        _ball(0.17, (0, 0.25, 0.28), GLASS),
        _rod(0.28, 0.25, 0.2, (0, -0.86, 0), DARK),
    ],
    "car": _car,
    "airplane": _airplane,
    "boat": lambda: [
        _dome((1.0, 0.5, 0.42), (0, -0.25, 0), tilt=180),
        _rod(0.045, 1.3, centre=(0, 0.35, 0), colour=WOOD),
        _prism(0.3, 1.0, 0.01, 4, (0.2, 0.45, 0), CREAM),
    ],
    "house": lambda: [
        _box((0.72, 0.5, 0.6), (0, -0.4, 0)),
        _prism(0.9, 0.75, 0.02, 4, (0, 0.45, 0), (0.55, 0.2, 0.13)),
        _box((0.15, 0.27, 0.05), (0, -0.62, 0.6), WOOD),
        _box((0.12, 0.12, 0.05), (0.45, -0.3, 0.6), GLASS),
        _box((0.12, 0.12, 0.05), (-0.45, -0.3, 0.6), GLASS),
    ],
    "castle": _castle,
    "hammer": lambda: [_box((0.6, 0.22, 0.22), (0, 0.72, 0)), _rod(0.1, 1.6, centre=(0, -0.2, 0), colour=WOOD)],
    "sword": lambda: [
        _box((0.17, 0.7, 0.06), (0, 0.35, 0), STEEL),
        _box((0.5, 0.11, 0.16), (0, -0.42, 0)),
        _rod(0.13, 0.5, centre=(0, -0.7, 0)),
        _ball(0.18, (0, -0.98, 0)),
    ],
    "bottle": lambda: [
        _rod(0.42, 1.1, centre=(0, -0.4, 0)),
        _rod(0.42, 0.35, 0.16, (0, 0.32, 0)),
        _rod(0.16, 0.45, centre=(0, 0.7, 0)),
        _rod(0.2, 0.16, centre=(0, 0.96, 0), colour=CREAM),
    ],
    "dumbbell": lambda: [
        _ball(0.42, (-0.62, 0, 0)),
        _ball(0.42, (0.62, 0, 0)),
        _rod(0.13, 1.2, colour=STEEL, turn=90),
    ],
    "ice cream": lambda: [_ball(0.55, (0, 0.5, 0)), _rod(0.03, 1.4, 0.5, (0, -0.35, 0), (0.80, 0.58, 0.30))],
    "umbrella": lambda: [
        _dome((0.98, 0.5, 0.98), (0, 0.3, 0)),
        _rod(0.05, 1.5, centre=(0, -0.2, 0), colour=WOOD),
        _ring(0.13, 0.05, (0.13, -0.93, 0), WOOD, tilt=90),
    ],
    "hat": lambda: [
        _rod(0.95, 0.12, centre=(0, -0.45, 0)),
        _rod(0.52, 0.9, centre=(0, 0.0, 0)),
        _rod(0.54, 0.16, centre=(0, -0.28, 0), colour=DARK),
    ],
    "cross": lambda: [_box((0.24, 0.95, 0.24)), _box((0.7, 0.24, 0.24), (0, 0.25, 0))],
    "stairs": lambda: [_box((0.22, 0.22 * (k + 1), 0.55), (-0.66 + 0.44 * k, 0.22 * k - 0.55, 0)) for k in range(4)],
    "arch": lambda: [
        _box((0.2, 0.65, 0.3), (-0.68, -0.25, 0)),
        _box((0.2, 0.65, 0.3), (0.68, -0.25, 0)),
        _box((0.95, 0.22, 0.3), (0, 0.58, 0)),
    ],
    "key": lambda: [
        _ring(0.36, 0.12, (0, 0.62, 0), tilt=90),
        _box((0.11, 0.65, 0.09), (0, -0.35, 0)),
        _box((0.2, 0.09, 0.09), (0.25, -0.6, 0)),
        _box((0.2, 0.09, 0.09), (0.25, -0.88, 0)),
    ],
}

# Solids that stand on one another in combined captions ("a red sphere on a blue cube").
STACK_TOPS = ("cube", "sphere", "cone", "torus", "pyramid", "cylinder")
STACK_BASES = ("cube", "cylinder")
_STACK_HALF_HEIGHT = {"cube": 0.75, "sphere": 0.9, "cone": 0.85, "torus": 0.27, "pyramid": 0.7, "cylinder": 0.85}


def stack(top: str, base: str, top_colour: tuple, base_colour: tuple) -> list[Primitive]:
    """One solid standing on another, each in its own colour, scaled to fit the usual two units."""
    out = []
    shrink = 0.62
    heights = (_STACK_HALF_HEIGHT[base] * shrink, _STACK_HALF_HEIGHT[top] * shrink)
    base_y, top_y = -heights[1], heights[0]
    for name, y, colour in ((base, base_y, base_colour), (top, top_y, top_colour)):
        for p in SHAPES[name]():
            sides = p.size[3] if p.kind == PRISM else p.size[3] * shrink
            size = (p.size[0] * shrink, p.size[1] * shrink, p.size[2] * shrink, sides)
            centre = (p.centre[0] * shrink, p.centre[1] * shrink + y, p.centre[2] * shrink)
            out.append(Primitive(p.kind, size, centre, colour, p.tilt, p.turn))
    return out
