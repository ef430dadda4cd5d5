"""Fetch the checkpoints of the full profile: ``.venv/bin/python -m scripts.ops.download_weights [--only NAME ...]``.

Everything is asked for first (what it is, whether this account may have it, whether the disk has room); then it is
fetched, with progress. What was cut off goes on where it stopped when this is run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from generation.settings import needed_by_profile
from generation.weights import Entry, WeightsError, lookup
from generation.weights.download import check_disk, fetch, plan
from generation.weights.registry import REGISTRY


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch the checkpoints of the full profile into the hub's cache.")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        choices=REGISTRY,
        help=f"this one; again for more: {', '.join(REGISTRY)}",
    )
    parser.add_argument("--revision", help="of the one that --only names, in place of the registry's")
    arguments = parser.parse_args(argv)
    if arguments.revision and len(arguments.only or ()) != 1:
        parser.error("--revision goes with exactly one --only")
    if arguments.revision and REGISTRY[arguments.only[0]].repo is None:
        parser.error(f"--revision: {arguments.only[0]} is one file, which has none")
    entries = [REGISTRY[name] for name in arguments.only] if arguments.only else profile_entries()
    if arguments.revision:
        entries = [replace(entries[0], revision=arguments.revision, sha256=())]

    plans, problems = [], []
    for entry in entries:
        size = "size not known" if entry.size_gb is None else f"{entry.size_gb} GB"
        gated = ", gated" if entry.gated else ""
        say(f"{entry.name}: {entry.repo or entry.url} at {entry.revision}, {size}, licence: {entry.licence}{gated}")
        try:
            plans.append(plan(entry))
        except WeightsError as error:
            problems.append(str(error))
    try:
        check_disk(plans)
    except WeightsError as error:
        problems.append(str(error))
        plans = []
    _tell(problems)
    say(f"{sum(each.remaining() for each in plans) / 1e9:.2f} GB to fetch")
    late = []
    for each in plans:
        try:
            fetch(each, say)
        except WeightsError as error:
            late.append(str(error))
        except KeyboardInterrupt:
            late.append("stopped; run this again to go on")
            break
    _tell([*problems, *late] if plans else late)  # again: hours may have passed
    return 1 if problems or late else 0


def _tell(problems: list[str]) -> None:
    for problem in problems:
        print(f"download_weights: {problem}", file=sys.stderr, flush=True)


def profile_entries() -> list[Entry]:
    """What the full profile loads under its default configs, and what the validators' whole score needs."""
    return [entry for entry in map(lookup, needed_by_profile("full").values()) if entry.is_downloaded]


if __name__ == "__main__":
    sys.exit(main())
