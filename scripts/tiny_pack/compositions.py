"""Random objects that no prompt names: primitives grown onto each other, and parts of the named shapes put together.

The quality net must say of shapes that it never saw whether they look right, so it learns from many more than the pack
has words for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from .shapes import (
    BOX,
    COLOURS,
    CUP,
    DOME,
    ELLIPSOID,
    FRUSTUM,
    MAX_PRIMITIVES,
    PRISM,
    SHAPES,
    TORUS,
    Primitive,
)

_KINDS = (ELLIPSOID, BOX, BOX, FRUSTUM, FRUSTUM, TORUS, PRISM, CUP, DOME)


def _colour(rng: random.Random) -> tuple[float, float, float]:
    """One that has a word, or any."""
    if rng.random() < 0.6:
        return rng.choice(list(COLOURS.values()))
    return rng.random(), rng.random(), rng.random()


def _size(kind: int, rng: random.Random, scale: float) -> tuple[float, float, float, float]:
    def length(low: float, high: float) -> float:
        return scale * math.exp(rng.uniform(math.log(low), math.log(high)))

    if kind == BOX:
        half = [length(0.08, 0.8) for _ in range(3)]
        return half[0], half[1], half[2], min(half) * rng.choice((0.05, 0.2, 0.6))
    if kind in (FRUSTUM, PRISM):
        bottom = length(0.1, 0.7)
        top = rng.choice((bottom, 0.01, bottom * rng.uniform(0.3, 1.6)))
        return bottom, length(0.1, 0.9), top, float(rng.choice((3, 4, 4, 5, 6))) if kind == PRISM else 0.0
    if kind == TORUS:
        ring = length(0.25, 0.7)
        return ring, ring * rng.uniform(0.12, 0.45), 0.0, 0.0
    if kind == CUP:
        bottom = length(0.25, 0.6)
        return bottom, length(0.2, 0.6), bottom * rng.uniform(0.9, 1.6), 0.1 * scale
    even = length(0.15, 0.7)
    round_one = rng.random() < 0.4
    return (even, even, even, 0.0) if round_one else (even, length(0.12, 0.7), length(0.12, 0.7), 0.0)


def _reach(primitive: Primitive, axis: int) -> float:
    """How far from its centre along an axis there is surely something of it, or that touches it."""
    a, b, c, _ = primitive.size
    if primitive.kind == TORUS:
        return a if axis != 1 else b
    if primitive.tilt or primitive.turn:
        return min(x for x in (a, b, c) if x > 0.02)
    if primitive.kind in (FRUSTUM, PRISM, CUP):
        return b if axis == 1 else 0.5 * (a + c)
    return (a, b, c)[axis] * (0.6 if primitive.kind == DOME and axis == 1 else 1.0)


def grown(rng: random.Random) -> list[Primitive]:
    """One to nine primitives, each begun inside of another; sometimes the same on both sides."""
    count = rng.choice((1, 2, 2, 3, 3, 4, 5, 6, 7, MAX_PRIMITIVES))
    mirrored = rng.random() < 0.4
    colours = [_colour(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    parts: list[Primitive] = []
    while len(parts) < count:
        kind = rng.choice(_KINDS)
        scale = 1.0 if not parts else rng.uniform(0.35, 0.9)
        upright = rng.random() < 0.6
        new = Primitive(
            kind,
            _size(kind, rng, scale),
            (0.0, 0.0, 0.0),
            rng.choice(colours),
            tilt=0.0 if upright else rng.choice((90.0, 180.0, rng.uniform(-90, 90))),
            turn=0.0 if upright else rng.choice((90.0, 0.0, rng.uniform(-90, 90))),
        )
        if parts:
            base, axis = rng.choice(parts), rng.randrange(3)
            if base.kind == TORUS and axis == 1:
                axis = 0
            far = rng.uniform(0.5, 0.95) * (_reach(base, axis) + 0.7 * _reach(new, axis)) * rng.choice((-1, 1))
            x, y, z = (c + far * (k == axis) for k, c in enumerate(base.centre))
            new = replace(new, centre=(x, y, z))
        parts.append(new)
        if mirrored and len(parts) < count and abs(new.centre[0]) > 0.1:
            x, y, z = new.centre
            parts.append(replace(new, centre=(-x, y, z), turn=-new.turn))
    return parts


def mixed(rng: random.Random, shapes: Sequence[str]) -> list[Primitive]:
    """Parts of two named shapes, each in colours of its own, one beside or on the other."""
    parts: list[Primitive] = []
    sideways = rng.random() < 0.4
    for side in (-1, 1):
        whole = SHAPES[rng.choice(shapes)]()
        tint = _colour(rng)
        shrink = rng.uniform(0.45, 0.75)
        x, y = (side * 0.45, 0.0) if sideways else (0.0, side * 0.5)
        z = rng.uniform(-0.15, 0.15)
        for p in whole[: MAX_PRIMITIVES // 2]:
            last = p.size[3] if p.kind == PRISM else p.size[3] * shrink
            size = (p.size[0] * shrink, p.size[1] * shrink, p.size[2] * shrink, last)
            centre = (p.centre[0] * shrink + x, p.centre[1] * shrink + y, p.centre[2] * shrink + z)
            parts.append(replace(p, size=size, centre=centre, colour=p.colour or tint))
    return parts


def motley(rng: random.Random, shapes: Sequence[str]) -> list[Primitive]:
    """A named shape with parts in any colours."""
    colours = [_colour(rng) for _ in range(rng.choice((1, 2, 3)))]
    return [replace(p, colour=rng.choice(colours)) for p in SHAPES[rng.choice(shapes)]()]


def varied(rng: random.Random, shapes: Sequence[str]) -> list[Primitive]:
    """A named shape in other proportions, the whole and each part; now and then a part is missing or foreign."""
    parts = SHAPES[rng.choice(shapes)]()
    tint, plain = _colour(rng), rng.random() < 0.5
    stretch = [math.exp(rng.gauss(0, 0.25)) for _ in range(3)]
    out: list[Primitive] = []
    for part in parts:
        own = math.exp(rng.gauss(0, 0.2))
        size = [length * own * math.exp(rng.gauss(0, 0.15)) for length in part.size]
        if part.kind == PRISM:
            size[3] = part.size[3]
        elif part.kind == ELLIPSOID and len(set(part.size[:3])) == 1 and rng.random() < 0.7:
            size[:3] = [size[0]] * 3
        x, y, z = (c * k for c, k in zip(part.centre, stretch, strict=True))
        colour = part.colour if plain and part.colour is not None else _colour(rng) if rng.random() < 0.15 else tint
        out.append(replace(part, size=(size[0], size[1], size[2], size[3]), centre=(x, y, z), colour=colour))
    if len(out) > 2 and rng.random() < 0.3:
        out.pop(rng.randrange(1, len(out)))
    if len(out) < MAX_PRIMITIVES and rng.random() < 0.3:
        kind, on = rng.choice(_KINDS), rng.choice(out)
        x, y, z = (c + rng.uniform(-1, 1) * _reach(on, axis) for axis, c in enumerate(on.centre))
        out.append(Primitive(kind, _size(kind, rng, rng.uniform(0.3, 0.7)), (x, y, z), _colour(rng)))
    return out


def turned(rng: random.Random) -> list[Primitive]:
    """Round or many-sided solids on one upright axis, as from a lathe; some meet in the same radius."""
    sides = float(rng.choice((3, 4, 5, 6, 8))) if rng.random() < 0.25 else 0.0
    colours = [_colour(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    radius, y = rng.uniform(0.15, 0.7), 0.0
    parts: list[Primitive] = []
    for _ in range(rng.choice((1, 2, 3, 3, 4, 5))):
        kind, colour = rng.random(), rng.choice(colours)
        height = math.exp(rng.uniform(math.log(0.08), math.log(1.2)))
        top = rng.choice((radius, 0.02, radius * rng.uniform(0.4, 1.7)))
        centre = (0.0, y + height / 2, 0.0)
        if kind < 0.6:
            parts.append(Primitive(PRISM if sides else FRUSTUM, (radius, height / 2, top, sides), centre, colour))
        elif kind < 0.75:
            parts.append(Primitive(ELLIPSOID, (radius, height / 2, radius, 0), centre, colour))
        elif kind < 0.85:
            tube = min(height / 2, radius * 0.45)
            parts.append(Primitive(TORUS, (radius, tube, 0, 0), (0.0, y + tube, 0.0), colour))
            height = 2 * tube
        else:
            parts.append(Primitive(DOME, (radius, height, radius, 0), (0.0, y, 0.0), colour))
            top = radius * rng.uniform(0.1, 0.6)
        y += height * rng.uniform(0.85, 1.0)
        radius = max(0.06, min(0.9, top if rng.random() < 0.6 else radius * math.exp(rng.gauss(0, 0.6))))
    tilt = 0.0 if rng.random() < 0.7 else 90.0
    if tilt:
        return [replace(p, centre=(0.0, p.centre[2], p.centre[1]), tilt=tilt) for p in parts]
    return parts


def composition(rng: random.Random, shapes: Sequence[str]) -> list[Primitive]:
    """One of the above; of the named shapes only `shapes` are used."""
    kind = rng.random()
    if kind < 0.35:
        return grown(rng)
    if kind < 0.5:
        return turned(rng)
    if kind < 0.75:
        return varied(rng, shapes)
    return mixed(rng, shapes) if kind < 0.88 else motley(rng, shapes)
