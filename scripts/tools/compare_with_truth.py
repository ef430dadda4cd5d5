"""Compare the miner's ledger with what the rehearsal's validators say they did (`neurons.rehearsal --truth FILE`).

    python -m scripts.tools.compare_with_truth LEDGER TRUTH [TRUTH ...]

Prints a table of outcomes by both, and each result that they do not agree on; exits 1 when there is one. Unknown agrees
with whatever happened, refused and given up with a task that the validator did not end.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

ENDED = ("accepted", "declined", "broken", "empty")
NOT_ENDED = ("refused", "given_up")
NOTHING = "-"


@dataclass(frozen=True)
class Difference:
    uid: int
    task_id: str
    ledger: tuple[str, ...]
    truth: tuple[str, ...]


@dataclass
class Comparison:
    """Outcomes by uid, and what the two sides do not agree on."""

    ledger: dict[int, Counter[str]] = field(default_factory=dict)
    truth: dict[int, Counter[str]] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)


def read_truth(paths: Iterable[Path]) -> dict[tuple[int, str], list[str]]:
    """(uid, task id) -> outcomes of a task by its validator's books: one, and one more for each crash that undid it.

    A task that was judged twice, by submissions that overlapped, was accepted if either was.
    """
    found: dict[tuple[int, str], list[str]] = {}
    for path in paths:
        lives: Counter[int] = Counter()  # uid -> starts and crashes so far
        ended_in: dict[tuple[int, str], int] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            note = json.loads(line)
            uid = int(note["uid"])
            if note["event"] in ("start", "crash"):
                lives[uid] += 1
            if note["event"] != "submission" or note["outcome"] not in ENDED:
                continue
            key = (uid, str(note["task"]))
            outcomes = found.setdefault(key, [])
            if ended_in.get(key) != lives[uid]:
                outcomes.append(note["outcome"])
            elif outcomes[-1] != "accepted":
                outcomes[-1] = note["outcome"]
            ended_in[key] = lives[uid]
    return found


def read_ledger(path: Path) -> dict[tuple[int, str], list[str]]:
    """(uid, task id) -> outcomes of its results, in their order."""
    found: dict[tuple[int, str], list[str]] = {}
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        for uid, task_id, outcome in connection.execute("SELECT uid, task_id, outcome FROM submissions ORDER BY id"):
            found.setdefault((uid, task_id), []).append(outcome)
    finally:
        connection.close()
    return found


def agree(ledger: list[str], truth: list[str]) -> bool:
    told = [outcome for outcome in ledger if outcome not in NOT_ENDED]
    if "unknown" in told:
        # It stands for one of the validator's outcomes, or for none.
        certain = [outcome for outcome in told if outcome != "unknown"]
        left = Counter(truth)
        left.subtract(certain)
        return min(left.values(), default=0) >= 0 and left.total() <= told.count("unknown")
    return told == truth


def compare(ledger: dict[tuple[int, str], list[str]], truth: dict[tuple[int, str], list[str]]) -> Comparison:
    """Of the validators that the truth is about."""
    comparison = Comparison()
    uids = {uid for uid, _ in truth}
    for uid, task_id in sorted(ledger.keys() | truth.keys()):
        if uid not in uids:
            continue
        ours, theirs = ledger.get((uid, task_id), []), truth.get((uid, task_id), [])
        comparison.ledger.setdefault(uid, Counter()).update(ours)
        comparison.truth.setdefault(uid, Counter()).update(theirs)
        if not agree(ours, theirs):
            comparison.differences.append(Difference(uid, task_id, tuple(ours), tuple(theirs)))
    return comparison


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("truth", type=Path, nargs="+")
    args = parser.parse_args()
    comparison = compare(read_ledger(args.ledger), read_truth(args.truth))
    names = [*ENDED, *sorted({name for each in comparison.ledger.values() for name in each} - {*ENDED})]
    table = Table(title="Results by the miner's ledger / by the validators' books")
    table.add_column("validator")
    for name in names:
        table.add_column(name, justify="right")
    for uid, ours in comparison.ledger.items():
        theirs = comparison.truth[uid]
        table.add_row(str(uid), *(f"{ours[name]} / {theirs[name] if name in ENDED else NOTHING}" for name in names))
    Console(width=120).print(table)
    for difference in comparison.differences:
        ledger, truth = (", ".join(outcomes) or NOTHING for outcomes in (difference.ledger, difference.truth))
        print(f"validator {difference.uid}, task {difference.task_id}: ledger {ledger}; truth {truth}")
    print(f"{len(comparison.differences)} differences")
    return 1 if comparison.differences else 0


if __name__ == "__main__":
    sys.exit(main())
