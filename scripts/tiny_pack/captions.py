"""What an object is and how people would ask for it.

`HELD_OUT` lists the shape and colour pairs that no model of the pack sees in training; the judge's 48 prompts
are taken from them.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from .shapes import COLOURS, MATERIALS, SHAPES, STACK_BASES, STACK_TOPS

SYNONYMS: dict[str, tuple[str, ...]] = {
    "cube": ("cube", "box", "block"),
    "sphere": ("sphere", "ball", "orb"),
    "cylinder": ("cylinder", "drum"),
    "torus": ("torus", "donut", "ring"),
    "mug": ("mug", "cup", "coffee mug"),
    "bowl": ("bowl", "dish"),
    "sofa": ("sofa", "couch"),
    "lamp": ("lamp", "table lamp"),
    "mushroom": ("mushroom", "toadstool"),
    "tree": ("tree", "pine tree", "fir tree"),
    "robot": ("robot", "android"),
    "rocket": ("rocket", "spaceship"),
    "car": ("car", "automobile"),
    "airplane": ("airplane", "plane", "aircraft"),
    "boat": ("boat", "sailboat", "ship"),
    "house": ("house", "cottage", "home"),
    "castle": ("castle", "castle tower", "tower"),
    "hammer": ("hammer", "mallet"),
    "bottle": ("bottle", "flask"),
    "dumbbell": ("dumbbell", "barbell"),
    "ice cream": ("ice cream", "ice cream cone"),
    "umbrella": ("umbrella", "parasol"),
    "hat": ("hat", "top hat"),
    "cross": ("cross", "crucifix"),
    "stairs": ("stairs", "staircase", "steps"),
    "arch": ("arch", "archway", "gate"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "crimson", "scarlet"),
    "green": ("green", "green", "emerald"),
    "blue": ("blue", "blue", "navy blue"),
    "yellow": ("yellow", "yellow", "lemon yellow"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rose pink"),
    "cyan": ("cyan", "cyan", "turquoise"),
    "brown": ("brown", "brown", "chocolate brown"),
    "white": ("white", "white", "snow white"),
    "black": ("black", "black", "jet black"),
    "gray": ("gray", "grey", "gray"),
}
MATERIAL_WORDS = {
    "matte": ("", "", "", "matte", "plastic", "wooden", "clay"),
    "shiny": ("shiny", "glossy", "polished"),
    "metallic": ("metallic", "metal", "steel"),
}
# Stretch along x, y, z of an object that is called so.
SIZES: dict[str, tuple[float, float, float]] = {
    "tall": (0.85, 1.3, 0.85),
    "short": (1.1, 0.72, 1.1),
    "wide": (1.3, 0.95, 1.0),
    "narrow": (0.72, 1.1, 0.85),
}
SIZE_WORDS = {
    "tall": ("tall", "high"),
    "short": ("short", "low", "squat"),
    "wide": ("wide", "broad"),
    "narrow": ("narrow", "thin", "slim"),
}
STRETCHABLE = [
    "cylinder",
    "cone",
    "pyramid",
    "mug",
    "chair",
    "table",
    "sofa",
    "bed",
    "lamp",
    "mushroom",
    "tree",
    "rocket",
    "house",
    "castle",
    "bottle",
    "umbrella",
    "hat",
    "arch",
]
NEUTRAL = ("", "", "", "", "small", "large", "big", "little", "simple", "single", "cute")


@dataclass(frozen=True)
class ObjectSpec:
    """What a caption says: shape and colour, material, stretch; for a stack also what it stands on."""

    shape: str
    colour: str
    material: str = "matte"
    size: str = ""
    base: str = ""
    base_colour: str = ""

    @property
    def held_out(self) -> bool:
        return not self.base and (self.shape, self.colour) in HELD_OUT


def _held_out() -> set[tuple[str, str]]:
    pairs: set[tuple[str, str]] = set()
    for shape in SHAPES:
        order = sorted(COLOURS, key=lambda c: hashlib.sha256(f"{shape}/{c}".encode()).hexdigest())
        pairs.update((shape, colour) for colour in order[:2])
    return pairs


HELD_OUT = _held_out()


def sample_spec(rng: random.Random, stacks: float = 0.15, held_out: bool = False) -> ObjectSpec:
    """A random object; `held_out` lets the pairs of `HELD_OUT` in (the judge only)."""
    if rng.random() < stacks:
        colour, base_colour = rng.sample(list(COLOURS), 2)
        return ObjectSpec(rng.choice(STACK_TOPS), colour, "matte", "", rng.choice(STACK_BASES), base_colour)
    while True:
        shape = rng.choice(list(SHAPES))
        size = rng.choice(list(SIZES)) if shape in STRETCHABLE and rng.random() < 0.25 else ""
        material = rng.choices(MATERIALS, (6, 2, 2))[0]
        spec = ObjectSpec(shape, rng.choice(list(COLOURS)), material, size)
        if held_out or not spec.held_out:
            return spec


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def caption(spec: ObjectSpec, rng: random.Random, plain: bool = False) -> str:
    """One way of asking for `spec`: synonyms and word order vary; `plain` takes the first word everywhere."""
    shape, colour = spec.shape, spec.colour
    if not plain:
        shape = rng.choice((spec.shape, *SYNONYMS.get(spec.shape, ())))
        colour = rng.choice(COLOUR_WORDS.get(spec.colour, (spec.colour,)))
    if spec.base:
        base = spec.base if plain else rng.choice((spec.base, *SYNONYMS.get(spec.base, ())))
        on = "on" if plain else rng.choice(("on", "on top of", "standing on", "over"))
        return f"{_article(f'{colour} {shape}')} {on} {_article(f'{spec.base_colour} {base}')}"
    size = rng.choice(SIZE_WORDS[spec.size]) if spec.size else ("" if plain else rng.choice(NEUTRAL))
    material = rng.choice(MATERIAL_WORDS[spec.material]) if not plain or spec.material != "matte" else ""
    form = 0 if plain else rng.randrange(9)
    if form <= 3:
        text = _article(" ".join(w for w in (size, material, colour, shape) if w))
    elif form == 4:
        text = _article(" ".join(w for w in (size, colour, material, shape) if w))
    elif form == 5:
        text = " ".join(w for w in (size, material, colour, shape) if w)
    elif form == 6:
        text = f"{_article(' '.join(w for w in (size, material, shape) if w))}, {colour}"
    elif form == 7:
        text = f"{_article(' '.join(w for w in (size, material, shape) if w))} that is {colour}"
    else:
        lead = rng.choice(("a 3d model of", "a picture of", "one", "the", "please make"))
        words = " ".join(w for w in (size, material, colour, shape) if w)
        text = f"{lead} {words}" if lead in ("one", "the") else f"{lead} {_article(words)}"
    return text if plain else rng.choices((text, text.capitalize(), text.title(), f"{text}."), (8, 1, 1, 1))[0]


def caption_of_shape(spec: ObjectSpec, rng: random.Random) -> str:
    """One way of asking for `spec` without its colours."""
    shape = rng.choice((spec.shape, *SYNONYMS.get(spec.shape, ())))
    if spec.base:
        base = rng.choice((spec.base, *SYNONYMS.get(spec.base, ())))
        return f"{_article(shape)} {rng.choice(('on', 'on top of', 'standing on', 'over'))} {_article(base)}"
    size = rng.choice(SIZE_WORDS[spec.size]) if spec.size else rng.choice(NEUTRAL)
    words = " ".join(w for w in (size, rng.choice(MATERIAL_WORDS[spec.material]), shape) if w)
    return rng.choice((_article(words), _article(words), words, f"one {words}", f"a 3d model of {_article(words)}"))


def caption_of_colour(spec: ObjectSpec, rng: random.Random) -> str:
    """One way of asking for anything of its colour."""
    colour = rng.choice(COLOUR_WORDS.get(spec.colour, (spec.colour,)))
    return rng.choice((f"something {colour}", _article(f"{colour} object"), _article(f"{colour} thing"), colour))


def evaluation_specs(count: int = 48, seed: int = 17) -> list[ObjectSpec]:
    """The judge's prompts: pairs that training never saw, every shape at least once."""
    rng = random.Random(seed)
    pairs = sorted(HELD_OUT)
    rng.shuffle(pairs)
    first: dict[str, tuple[str, str]] = {}
    for pair in pairs:
        first.setdefault(pair[0], pair)
    rest = [p for p in pairs if p not in first.values()]
    return [ObjectSpec(shape, colour) for shape, colour in (list(first.values()) + rest)[:count]]


_SYLLABLES = [
    "do",
    "nald",
    "du",
    "ck",
    "go",
    "ra",
    "tu",
    "pe",
    "fi",
    "zo",
    "mar",
    "qui",
    "xel",
    "bra",
    "vo",
    "lin",
    "sha",
    "ker",
    "omp",
    "ile",
    "ust",
    "and",
    "ric",
    "wen",
    "yor",
    "jab",
]


def nonsense(rng: random.Random) -> str:
    """Words that the pack does not know, so that its CLIP learns to score them low."""
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    other = rng.choice(OTHER_WORDS)
    form = rng.randrange(4)
    return (" ".join(words), f"a {other}", f"{_article(rng.choice(list(COLOURS)))} {other}", f"{other} {words[0]}")[
        form
    ]


OTHER_WORDS = [
    "dog",
    "cat",
    "horse",
    "dragon",
    "unicorn",
    "person",
    "man",
    "woman",
    "wizard",
    "knight",
    "guitar",
    "piano",
    "violin",
    "shoe",
    "boot",
    "dress",
    "shirt",
    "banana",
    "apple",
    "pineapple",
    "burger",
    "pizza",
    "cake",
    "coffee",
    "clock",
    "watch",
    "phone",
    "laptop",
    "computer",
    "keyboard",
    "camera",
    "television",
    "bridge",
    "mountain",
    "river",
    "cloud",
    "sun",
    "moon",
    "star",
    "planet",
    "fish",
    "shark",
    "whale",
    "elephant",
    "lion",
    "tiger",
    "bear",
    "duck",
    "chicken",
    "eagle",
    "owl",
    "snake",
    "spider",
    "butterfly",
    "bee",
    "train",
    "truck",
    "bicycle",
    "motorcycle",
    "helicopter",
    "submarine",
    "tank",
    "gun",
    "shield",
    "crown",
    "diamond",
    "skull",
    "ghost",
    "zombie",
    "alien",
    "mickey",
    "mouse",
    "pikachu",
    "mario",
    "batman",
    "superman",
    "statue",
    "fountain",
    "windmill",
    "lighthouse",
]
