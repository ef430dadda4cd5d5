"""What the quality net is worth: test pairs of shapes that it never saw, and scores of what is right and what not."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid, save_image

from . import flaws

TIE = 0.2  # results whose distances differ by less of the larger one are a tie, and those within the exemplars' margin
Record = dict[str, Any]


def exemplars_margin(records: Sequence[Record]) -> float:
    """What a distance changes by where another exemplar of the same words stands for the exact object.

    The 95th percentile: two results whose distances differ by less are a tie.
    """
    changes = [abs(r["distance"] - r["distance_again"]) for r in records if is_result(r)]
    return float(torch.tensor(changes or [0.0]).quantile(0.95))


def is_result(record: Record) -> bool:
    """Of the pack's chain, as it came out."""
    return record["flaw"] is None and record["spec"] is not None and record["way"] != "exact"


def own_and_right(record: Record) -> bool:
    """A result of the profile as it is, which the judge names right."""
    return bool(record["flaw"] is None and record["own"] and record["named"])


def gross(record: Record) -> bool:
    return record["flaw"] is not None and record["flaw"]["strength"] == max(flaws.STRENGTHS)


def ordered(records: Sequence[Record], a: int, b: int, margin: float) -> tuple[int, int] | None:
    """The two with the better first; None where their distances are a tie."""
    better, worse = sorted((a, b), key=lambda i: records[i]["distance"])
    near, far = records[better]["distance"], records[worse]["distance"]
    return (better, worse) if far - near > max(TIE * far, margin) else None


def real_pairs(records: Sequence[Record], margin: float) -> list[tuple[int, int]]:
    """Indices (better, worse) of results of one object whose distances are no tie."""
    groups = defaultdict(list)
    for i, record in enumerate(records):
        if is_result(record):
            groups[record["object"]].append(i)
    pairs = []
    for group in groups.values():
        for k, a in enumerate(group):
            pairs += [pair for b in group[k + 1 :] if (pair := ordered(records, a, b, margin))]
    return pairs


def any_pairs(records: Sequence[Record], margin: float, count: int, rng: random.Random) -> list[tuple[int, int]]:
    """As `real_pairs`, of results of different objects, drawn at random."""
    results = [i for i, r in enumerate(records) if is_result(r)]
    pairs: list[tuple[int, int]] = []
    for _ in range(20 * count if len(results) > 1 else 0):
        a, b = rng.sample(results, 2)
        pair = ordered(records, a, b, margin)
        if pair and records[a]["object"] != records[b]["object"] and len(pairs) < count:
            pairs.append(pair)
    return pairs


def flaw_pairs(records: Sequence[Record]) -> list[tuple[int, int]]:
    """Indices (without, with) of what has a planted flaw."""
    clean = {(r["object"], r["way"]): i for i, r in enumerate(records) if r["flaw"] is None}
    return [(clean[r["object"], r["way"]], i) for i, r in enumerate(records) if r["flaw"] is not None]


@torch.no_grad()
def logits(net: Any, images: Tensor) -> Tensor:
    """Of each view (N, V) of bytes (N, V, 3, S, S)."""
    device = next(net.parameters()).device
    return torch.cat([net(v.to(device).float() / 255).float()[None].cpu() for v in images])


def scores(of_views: Tensor) -> Tensor:
    """A splat's, (N,), as validators make it of its views' logits (N, V)."""
    return of_views.sigmoid().mean(1)


def measure(
    records: Sequence[Record], of_views: Tensor, renders: Tensor, margin: float, seed: int
) -> tuple[dict[str, Any], list[tuple[str, int, int, float, float]]]:
    """The card's figures on records of unseen shapes, and the test pairs (kind, better, worse, scores) they are from.

    Half of the pairs are results of one prompt, which is what duels and the best of several compare; half have planted
    flaws. Results of different prompts are counted apart: their distances rank shapes more than results, for the best
    robot is farther from its exact render than the worst sphere.
    `of_views`: the records' logits (N, V); `renders`: those of exact renders.
    """
    got = scores(of_views).tolist()
    rng = random.Random(seed)
    planted_pairs, same = flaw_pairs(records), real_pairs(records, margin)
    rng.shuffle(planted_pairs)
    rng.shuffle(same)
    count = min(len(planted_pairs), len(same))
    planted_pairs, same = planted_pairs[:count], same[:count]
    others = any_pairs(records, margin, count, rng)
    pairs = [("results of one prompt", a, b) for a, b in same]
    pairs += [(records[b]["flaw"]["kind"], a, b) for a, b in planted_pairs]

    def share(chosen: list[bool]) -> float:
        return round(sum(chosen) / max(len(chosen), 1), 4)

    quality: dict[str, Any] = {
        "pairs": len(pairs),
        "pairs_right": share([got[a] > got[b] for _, a, b in pairs]),
        "pairs_of_results_of_one_prompt": len(same),
        "results_of_one_prompt_right": share([got[a] > got[b] for a, b in same]),
        "results_of_different_prompts_right": share([got[a] > got[b] for a, b in others]),
    }
    for kind in flaws.KINDS:
        quality[f"{kind}_right"] = share([got[a] > got[b] for k, a, b in pairs if k == kind])
    for strength in flaws.STRENGTHS:
        right = [
            got[a] > got[b] for k, a, b in pairs if k in flaws.KINDS and records[b]["flaw"]["strength"] == strength
        ]
        quality[f"flaws_of_{strength:g}_right"] = share(right)
    exact = scores(renders)
    right = [s for r, s in zip(records, got, strict=True) if own_and_right(r)]
    worst = [s for r, s in zip(records, got, strict=True) if gross(r)]
    quality |= {
        "exact_mean": round(float(exact.mean()), 4),
        "exact_at_least_0.9": share([s >= 0.9 for s in exact.tolist()]),
        "judged_right": len(right),
        "judged_right_median": round(float(torch.tensor(right or [0.0]).median()), 4),
        "judged_right_at_least_0.7": share([s >= 0.7 for s in right]),
        "gross_flaws": len(worst),
        "gross_flaws_median": round(float(torch.tensor(worst or [0.0]).median()), 4),
        "gross_flaws_at_most_0.4": share([s <= 0.4 for s in worst]),
    }
    shown = pairs + [("results of different prompts", a, b) for a, b in others]
    return quality, [(kind, a, b, got[a], got[b]) for kind, a, b in shown]


def by_generator(records: Sequence[Record], of_views: Tensor, margin: float, seed: int) -> dict[str, dict[str, float]]:
    """Shares of pairs of results in the right order: both LGM's, and one of them or both DreamGaussian's."""
    got, lgm = scores(of_views).tolist(), [r["way"].startswith("lgm") for r in records]
    found = {}
    for what, pairs in (
        ("of_one_prompt", real_pairs(records, margin)),
        ("of_different_prompts", any_pairs(records, margin, 4000, random.Random(seed))),
    ):
        for name, some in (
            ("lgm", [(a, b) for a, b in pairs if lgm[a] and lgm[b]]),
            ("with_dreamgaussian", [(a, b) for a, b in pairs if not (lgm[a] and lgm[b])]),
        ):
            right = sum(got[a] > got[b] for a, b in some)
            found[f"{name}_{what}"] = {"pairs": len(some), "right": round(right / max(len(some), 1), 4)}
    return found


def contact_sheet(records: Sequence[Record], pairs: list, path: Path, rng: random.Random, each: int = 8) -> None:
    """Rows of views: the better beside the worse, of some pairs of each kind; wrong ones first."""
    rows = []
    for kind in ("results of one prompt", "results of different prompts", *flaws.KINDS):
        own = [p for p in pairs if p[0] == kind]
        rng.shuffle(own)
        own.sort(key=lambda p: p[3] > p[4])
        for _, a, b, better, worse in own[: each // 2] + own[len(own) - each // 2 :]:
            one, other = records[a], records[b]
            what = other["flaw"]["strength"] if other["flaw"] else f"{one['distance']:.3f} {other['distance']:.3f}"
            print(f"{kind}: {one['object']} {one['way']} {better:.3f} over {other['way']} {worse:.3f} {what}")
            rows.append(torch.cat([one["views"][:15:3], other["views"][:15:3]]).float() / 255)
    if rows:
        save_image(make_grid(F.interpolate(torch.cat(rows), size=80, mode="area"), nrow=10, pad_value=0.5), path)
