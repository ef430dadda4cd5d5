"""What the miner earned in the last hours: a table by validator, and a plot.

python -m scripts.ops.report [--ledger data/NETWORK-NETUID-HOTKEY/ledger.sqlite] [--plot data/report.png] [--hours 4]

Reads the ledger only, so it may run at any time beside the miner. Without --ledger it takes the one with the newest
entry of those in data, a rehearsal's only when there is no other, and says which.
What the columns say:

tasks            pulled, each counted once
accepted, rate   by the validator's answers; of all results of which it is known what became of them
mean score       the validator's, of accepted results: of others it tells none
reward           accepted x rating, as the validator last said
s per task       of the generation services' time
of the ceiling   of one accepted result per 300 s; over 100 % in a rehearsal, whose clock runs faster
violations       pulls that were answered with a cooldown
penalty minutes  waits after results that were declined

A second table says what became of every result:

declined         the score was too low; 600 s more until the next task
broken           the validator's scoring gave no answer, which costs nothing
empty            there was nothing worth submitting, which costs nothing
refused          by the validator's server
given up         the validator was out of reach
unknown          the answer was lost, and the next one has not told (yet) what became of it

A third one says what became of the time that costs nothing:

candidates       of how many a result was the best, on average
gain             by how much its score, the self-check's, is over that of its first candidate, on average
busy             the share of the time in which the generation services had a task
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neurons.defaults import DATA, REHEARSAL_STATE
from neurons.miner.options import LEDGER_NAME
from neurons.miner.records.events import SubmissionOutcome
from neurons.miner.records.standings import Standing, connect, standings
from neurons.miner.records.verdicts import TASK_COOLDOWN_S, WINDOW_S

BIN_S = 600.0
SHORTEST_PLOT_S = 6 * BIN_S  # of a ledger that has just begun
# More validators than this can not be told apart by colour: the smaller ones are drawn as one.
COLOURED_VALIDATORS = 12
OTHERS = -1

# Neighbours in a stack differ in hue and in lightness.
PALETTE = (
    *("#1d3557", "#2a6f97", "#2a9d8f", "#8ab17d", "#e9c46a", "#f4a261"),
    *("#e76f51", "#b8473a", "#8c2f4b", "#7b4b94", "#5e6fce", "#a3b8e8"),
)
GREY = "#b8b8b8"
INK = "#333333"
# What is drawn of results that were not accepted; the others are in the table.
LOST = {"declined": "#c1121f", "broken": "#8d99ae"}


@dataclass(frozen=True)
class Report:
    """The ledger's content for one window. Times are unix seconds."""

    since: float
    until: float
    begins: float | None  # the ledger's first row of all
    standings: list[Standing]  # most accepted first
    accepted: Mapping[int, Sequence[tuple[float, float | None]]]  # UID -> (time, score)
    lost: Mapping[str, Sequence[float]]  # outcome -> times: what was made and not accepted
    services: int = 0  # generation services that had a task

    @property
    def covered(self) -> float:
        """Seconds of the window that the ledger covers."""
        return self.until - max(self.since, self.until if self.begins is None else self.begins)

    @property
    def busy(self) -> float | None:
        """The share of the time in which a generation service had a task; None without any."""
        if not self.services or self.covered <= 0:
            return None
        return min(1.0, sum(each.gpu_s for each in self.standings) / (self.covered * self.services))

    @property
    def ceiling(self) -> float:
        """The most tasks that one validator can have given in what the ledger covers: one in each cooldown."""
        return max(self.covered / TASK_COOLDOWN_S, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--plot", type=Path, default=Path("data/report.png"))
    parser.add_argument("--hours", type=float, default=WINDOW_S / 3600)
    args = parser.parse_args(arguments)
    if not 0 < args.hours <= 168:
        parser.error("--hours: more than 0, at most 168")
    found = [args.ledger] if args.ledger else ledgers()
    if not found:
        print(f"No ledger to read: there is no {DATA}/*/{LEDGER_NAME}; see --ledger", file=sys.stderr)
        return 1
    path, *others = found
    try:
        # The miner's clock does not follow when this machine's is set back.
        report = read(path, max(time.time(), _newest_entry(path)), args.hours * 3600)
    except sqlite3.Error as error:
        print(f"No ledger to read at {path}: {error}", file=sys.stderr)
        return 1
    rehearsed = path.parent == REHEARSAL_STATE
    print(f"Ledger: {path}{' (a rehearsal: nothing of it reached the subnet)' if rehearsed else ''}")
    for other in others:
        print(f"  another, for --ledger: {other}")
    console = Console()
    console.print(table(report))
    console.print(outcomes(report))
    console.print(candidates(report))
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(report, args.plot)
    console.print(f"Plot: {args.plot}", highlight=False)
    return 0


def ledgers() -> list[Path]:
    """Of all miners that were started in this folder, in the order of their newest entries, a rehearsal's last."""
    found = DATA.glob(f"*/{LEDGER_NAME}")
    return sorted(found, key=lambda path: (path.parent != REHEARSAL_STATE, _newest_entry(path)), reverse=True)


def _newest_entry(path: Path) -> float:
    try:
        with closing(connect(path)) as connection:
            return float(connection.execute("SELECT max(at) FROM pulls").fetchone()[0] or 0.0)
    except sqlite3.Error:
        return 0.0


def read(path: Path, until: float, window: float) -> Report:
    """Raises sqlite3.Error."""
    since = until - window
    with closing(connect(path)) as connection:
        found = standings(connection, until, window)
        uids = {standing.hotkey: standing.uid for standing in found.values()}
        accepted, lost = defaultdict(list), defaultdict(list)
        for row in connection.execute(
            "SELECT at, hotkey, outcome, score FROM submissions WHERE at > ? AND at <= ? ORDER BY at", (since, until)
        ):
            if row["outcome"] == "accepted":
                accepted[uids[row["hotkey"]]].append((row["at"], row["score"]))
            else:
                lost[row["outcome"]].append(row["at"])
        services = connection.execute(
            "SELECT count(DISTINCT endpoint) FROM generations WHERE at > ? AND at <= ? AND seconds > 0", (since, until)
        ).fetchone()[0]
        begins = connection.execute("SELECT min(at) FROM pulls").fetchone()[0]
    ranked = sorted(found.values(), key=lambda each: (-each.accepted, each.uid))
    return Report(since, until, begins, ranked, accepted, lost, services)


def table(report: Report) -> Table:
    hours = (report.until - report.since) / 3600
    end = datetime.fromtimestamp(report.until)
    caption = f"Until {end:%Y-%m-%d %H:%M}. Ceiling: one task per validator and {TASK_COOLDOWN_S:.0f} s"
    if report.begins is None:
        caption = "Nothing in the ledger yet"
    elif report.begins > report.since:
        ago = report.until - report.begins
        caption += f".\nThe ledger begins {f'{ago / 60:.0f} min' if ago < 3600 else f'{ago / 3600:.1f} h'} ago"
    result = _table(_COLUMNS, _total(report.standings, report.ceiling), f"Last {hours:g} hours", caption)
    for each in report.standings:
        # A hotkey may look like markup.
        result.add_row(*map(escape, _cells(each, report.ceiling)))
    return result


def outcomes(report: Report) -> Table:
    """What became of every result."""
    found = report.standings
    footer = [f"all {len(found)}", *(f"{sum(getattr(each, name) for each in found)}" for name in _OUTCOMES)]
    headers = ("validator", *(name.replace("_", " ") for name in _OUTCOMES))
    result = _table(headers, footer, "What became of the results", None)
    for each in found:
        result.add_row(escape(_name(each)), *(f"{getattr(each, name)}" for name in _OUTCOMES))
    return result


def candidates(report: Report) -> Table:
    """Of how many each result was the best, and what that gained."""
    found = report.standings
    footer = (
        f"all {len(found)}",
        _number(_mean([(each.candidates, each.submitted) for each in found]), 1),
        _number(_mean([(each.gain, each.submitted) for each in found]), 3),
    )
    caption = None if report.busy is None else f"services busy: {_percent(report.busy)}"
    result = _table(("validator", "candidates", "gain"), footer, "The best of several", caption)
    for each in found:
        result.add_row(escape(_name(each)), _number(each.candidates, 1), _number(each.gain, 3))
    return result


def _table(columns: Sequence[str], footer: Sequence[str], title: str, caption: str | None) -> Table:
    result = Table(
        title=title,
        caption=caption,
        show_footer=True,
        header_style="bold",
        footer_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for name, foot in zip(columns, footer, strict=True):
        result.add_column(name, foot, justify="left" if name == columns[0] else "right", no_wrap=True)
    return result


_COLUMNS = (
    *("validator", "tasks", "accepted", "rate", "mean\nscore", "reward", "s per\n task"),
    *("of the\nceiling", "violations", "penalty\nminutes"),
)
_OUTCOMES = ("submitted", *get_args(SubmissionOutcome))


def _name(each: Standing) -> str:
    return f"{each.uid:>3} {each.hotkey[:5]}"


def _cells(each: Standing, ceiling: float) -> tuple[str, ...]:
    return (
        _name(each),
        f"{each.tasks}",
        f"{each.accepted}",
        _percent(each.acceptance_rate),
        _number(each.mean_score, 2),
        _number(each.reward, 0),
        _number(each.gpu_s_per_task, 1),
        _percent(each.accepted / ceiling),
        f"{each.early}",
        f"{each.penalty_s / 60:.0f}",
    )


def _total(found: Sequence[Standing], ceiling: float) -> tuple[str, ...]:
    submitted, accepted = sum(each.submitted for each in found), sum(each.accepted for each in found)
    known = sum(each.known for each in found)
    rewards = [each.reward for each in found if each.reward is not None]
    return (
        f"all {len(found)}",
        f"{sum(each.tasks for each in found)}",
        f"{accepted}",
        _percent(accepted / known if known else None),
        _number(_mean([(each.mean_score, each.accepted) for each in found]), 2),
        _number(sum(rewards) if rewards else None, 0),
        _number(sum(each.gpu_s for each in found) / submitted if submitted else None, 1),
        _percent(accepted / (ceiling * len(found)) if found else None),
        f"{sum(each.early for each in found)}",
        f"{sum(each.penalty_s for each in found) / 60:.0f}",
    )


def _mean(values: Sequence[tuple[float | None, float]]) -> float | None:
    """Of values with their weights, as far as they are known."""
    known = [(value, weight) for value, weight in values if value is not None]
    weights = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / weights if weights else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def plot(report: Report, path: Path) -> None:
    style: Any = {  # of matplotlib's keys
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
    }
    with plt.rc_context(style):
        figure, (bars, dots) = plt.subplots(
            *(2, 1), figsize=(12, 7.5), sharex=True, height_ratios=(3, 2), layout="constrained"
        )
        colours = _colours(report)
        _draw_accepted(bars, report, colours)
        _draw_scores(dots, report, colours)
        begins = report.since if report.begins is None else min(report.begins, report.until - SHORTEST_PLOT_S)
        dots.set_xlim(_date(max(report.since, begins)), _date(report.until))
        locator = mdates.AutoDateLocator()
        dots.xaxis.set_major_locator(locator)
        dots.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _colours(report: Report) -> dict[int, str]:
    """By UID, those that accepted most first; OTHERS stands for the rest."""
    uids = [each.uid for each in report.standings if each.uid in report.accepted]
    if len(uids) > COLOURED_VALIDATORS:
        return {**dict(zip(uids[: COLOURED_VALIDATORS - 1], PALETTE, strict=False)), OTHERS: GREY}
    return dict(zip(uids, PALETTE, strict=False))


def _draw_accepted(axes: Axes, report: Report, colours: Mapping[int, str]) -> None:
    # Whole bins up to now: the first one begins before the window rather than the last one ends after it.
    count = int(np.ceil((report.until - report.since) / BIN_S))
    edges = report.until - BIN_S * np.arange(count, -1, -1)
    heights = {uid: np.zeros(count) for uid in colours}
    for uid, points in report.accepted.items():
        counts, _ = np.histogram([at for at, _ in points], edges)
        heights[uid if uid in heights else OTHERS] += counts
    base = np.zeros(count)
    left, width = [_date(edge) for edge in edges[:-1]], 0.88 * BIN_S / 86_400
    for uid, height in heights.items():
        name = "others" if uid == OTHERS else f"{uid}"
        axes.bar(
            left, height, width, base, align="edge", color=colours[uid], label=name, edgecolor="white", linewidth=0.6
        )
        base += height
    total = int(base.sum())
    axes.set_title(
        f"{total} tasks accepted in the last {(report.until - report.since) / 3600:g} hours",
        loc="left",
        fontsize=14,
        fontweight="bold",
    )
    axes.set_ylabel("accepted per 10 minutes")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if report.standings:
        share = total / (report.ceiling * len(report.standings))
        axes.set_title(f"{_percent(share)} of the ceiling", loc="right", fontsize=10)
        ceiling = len(report.standings) * BIN_S / TASK_COOLDOWN_S
        axes.axhline(ceiling, color=INK, linewidth=1, linestyle=(0, (6, 4)))
        note = f"ceiling of {len(report.standings)} validators"
        axes.annotate(
            *(note, (0, ceiling)),
            xycoords=("axes fraction", "data"),
            xytext=(2, 3),
            textcoords="offset points",
            fontsize=9,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
        axes.set_ylim(0, 1.12 * max(ceiling, base.max()))
    if total:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            *(handles[::-1], labels[::-1]),
            title="validator",
            loc="center left",
            bbox_to_anchor=(1.0, 0.5),
            frameon=False,
            alignment="left",
        )
    else:
        _say_nothing_yet(axes)


def _draw_scores(axes: Axes, report: Report, colours: Mapping[int, str]) -> None:
    axes.set_ylabel("validators' score")
    scored = []
    for uid, points in report.accepted.items():
        known = [(at, score) for at, score in points if score is not None]
        scored += known
        if known:
            dates, scores = [_date(at) for at, _ in known], [score for _, score in known]
            axes.scatter(dates, scores, s=16, color=colours.get(uid, GREY), alpha=0.75, linewidths=0, clip_on=False)
    # No score is told of what was not accepted: it is drawn along the time axis.
    for outcome, colour in LOST.items():
        times = report.lost.get(outcome, ())
        if times:
            axes.scatter(
                [_date(at) for at in times],
                [0.04] * len(times),
                s=32,
                marker="x",
                color=colour,
                linewidths=1.5,
                clip_on=False,
                label=f"{len(times)} {outcome.replace('_', ' ')}",
                transform=axes.get_xaxis_transform(),
            )
    if not scored and not any(report.lost.get(outcome) for outcome in LOST):
        _say_nothing_yet(axes)
        return
    means = _moving_mean(sorted(scored), BIN_S)
    if means:
        dates, scores = [_date(at) for at, _ in means], [mean for _, mean in means]
        axes.plot(dates, scores, color=INK, linewidth=1.8, label="mean of the accepted, 30 minutes")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.97), frameon=False, ncols=3, fontsize=9)


def _moving_mean(points: Sequence[tuple[float, float]], step: float) -> list[tuple[float, float]]:
    """From the first point to the last, about every `step` seconds, the mean of the points within 1.5 steps."""
    if not points:
        return []
    times, values = np.array(points).T
    result = []
    for at in np.linspace(times[0], times[-1], 1 + int(np.ceil((times[-1] - times[0]) / step))):
        near = np.abs(times - at) <= 1.5 * step
        if near.any():
            result.append((float(at), float(values[near].mean())))
    return result


def _say_nothing_yet(axes: Axes) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=14)


def _date(unix_time: float) -> float:
    """Local time, as matplotlib counts it."""
    return float(mdates.date2num(datetime.fromtimestamp(unix_time)))


if __name__ == "__main__":
    sys.exit(main())
