"""The validators' final score, also when weights for a part of it are missing. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from common.log_lines import SCORE_PARTS, score_in_words

#: the parts by name, with their share of the final score
SHARES = {"iqa": 0.75, "alignment": 0.2, "ssim": 0.025, "lpips": 0.025}
#: an alignment below this makes the final score 0
MIN_ALIGNMENT = 0.3
# SSIM and LPIPS count as sigmoid(slope * (value - middle)), LPIPS times itself.
_SSIM_SLOPE, _SSIM_MIDDLE = 35.0, 0.83
_LPIPS_SLOPE, _LPIPS_MIDDLE = 30.0, 0.7


def shares(available: Collection[str]) -> dict[str, float]:
    """What each available part counts for, in all 1.

    Parts that are not available leave the sum. SSIM and LPIPS, a fortieth each, correct what quality and alignment say
    together; without the quality model alignment alone decides.
    """
    if "iqa" not in available:
        return {"alignment": 1.0}
    kept = {part: share for part, share in SHARES.items() if part in available}
    whole = sum(kept.values()) if len(kept) < len(SHARES) else 1.0
    return {part: share / whole for part, share in kept.items()}


def final_score(parts: Mapping[str, float | None], min_alignment: float = MIN_ALIGNMENT) -> float:
    """The final score of measured parts; None: its weights are not here. Alignment is always there.

    A validator does not limit it to 1 from above, and alignment neither. What is not finite counts as 0.
    """
    known = {part: value for part, value in parts.items() if value is not None}
    if not all(math.isfinite(value) for value in known.values()) or known["alignment"] < min_alignment:
        return 0.0
    terms = {
        "iqa": lambda value: value,
        "alignment": lambda value: value,
        "ssim": lambda value: _sigmoid(_SSIM_SLOPE * (value - _SSIM_MIDDLE)),
        "lpips": lambda value: value * _sigmoid(_LPIPS_SLOPE * (value - _LPIPS_MIDDLE)),
    }
    return sum(share * terms[part](known[part]) for part, share in shares(known).items())


def formula(available: Collection[str]) -> str:
    """What the score consists of, in words: ``0.75 quality + 0.2 alignment + 0.025 SSIM + 0.025 LPIPS``."""
    counted = shares(available)
    if len(counted) == 1:
        return "alignment alone"
    return " + ".join(f"{round(share, 4):g} {SCORE_PARTS[part]}" for part, share in counted.items())


def in_words(score: float, parts: Mapping[str, float | None]) -> str:
    """A score with the parts that count in it."""
    known = {part: value for part, value in parts.items() if value is not None}
    return score_in_words(score, {part: known[part] for part in shares(known)})


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0
