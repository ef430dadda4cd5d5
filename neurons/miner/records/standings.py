"""What the ledger says about each validator over a window of time. Reads only; the miner may be writing meanwhile."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from neurons.miner.records.events import SubmissionOutcome
from neurons.miner.records.ledger import OUTCOME_OF_VERSION_1
from neurons.miner.records.verdicts import WINDOW_S


@dataclass(frozen=True)
class Standing:
    """One validator over the window. Times are in seconds; a mean is None where there is nothing to average.

    `submitted` counts every result that was made for the validator. What became of them is counted by outcome, as
    events.SubmissionOutcome explains them; `unknown` may still be settled.
    `attempted` counts the tasks that a generation service spent time on. `early` are pulls that it answered with a
    cooldown. `gpu_s` is the generation services' time, rejected and failed attempts included. While a service has
    several tasks, each is charged an equal share of the time. `penalty_s` are the waits after results that it declined.
    `candidates` is how many a result was the best of, and `gain` by how much its score, the self-check's, is over that
    of the first; means over the results that were made.
    `mean_score` is of accepted results, for no other score is told. `reward` is what it last said: accepted results x
    rating, by its own count.
    """

    uid: int
    hotkey: str
    tasks: int = 0
    early: int = 0
    attempted: int = 0
    gpu_s: float = 0.0
    submitted: int = 0
    accepted: int = 0
    declined: int = 0
    broken: int = 0
    empty: int = 0
    refused: int = 0
    given_up: int = 0
    unknown: int = 0
    mean_score: float | None = None
    reward: float | None = None
    penalty_s: float = 0.0
    last_task_at: float | None = None
    candidates: float | None = None
    gain: float | None = None

    @property
    def known(self) -> int:
        """Results of which it is known what became of them."""
        return self.submitted - self.unknown

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted results, as a share of those whose fate is known; None without any."""
        return self.accepted / self.known if self.known else None

    @property
    def gpu_s_per_task(self) -> float | None:
        """Seconds of generation for each result submitted; None without any."""
        return self.gpu_s / self.submitted if self.submitted else None


def read(path: Path, until: float) -> dict[str, Standing]:
    """The standings in the WINDOW_S up to `until` (unix seconds), by hotkey. Raises sqlite3.Error."""
    with closing(connect(path)) as connection:
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            return {}  # the miner is about to begin it
        return standings(connection, until, WINDOW_S)


def connect(path: Path) -> sqlite3.Connection:
    """For reading alone; all queries see one state of the file. Raises sqlite3.Error, also when there is no file."""
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    # A miner of this version has not written in it yet.
    if version in (1, 2):
        connection.execute(
            "CREATE TEMP VIEW generations AS SELECT *, NULL AS candidates, NULL AS first_score FROM main.generations"
        )
    if version == 1:
        columns = [row["name"] for row in connection.execute("PRAGMA table_info(submissions)")]
        columns[columns.index("outcome")] = f"{OUTCOME_OF_VERSION_1} AS outcome"
        columns[columns.index("score")] = "nullif(score, 0.0) AS score"
        connection.execute(f"CREATE TEMP VIEW submissions AS SELECT {', '.join(columns)} FROM main.submissions")
    connection.execute("BEGIN")
    return connection


def standings(connection: sqlite3.Connection, until: float, window: float) -> dict[str, Standing]:
    """As `read`, of an open connection and `window` seconds."""
    since = until - window
    found: dict[str, dict[str, float | str | None]] = defaultdict(dict)
    for table, counts in _COUNTS.items():
        for row in connection.execute(
            f"SELECT hotkey, {counts} FROM {table} WHERE at > ? AND at <= ? GROUP BY hotkey", (since, until)
        ):
            found[row["hotkey"]] |= {key: row[key] for key in row.keys() if row[key] is not None}  # noqa: SIM118
    # A validator keeps its hotkey and may get another UID: the latest one holds.
    for table in _COUNTS:
        for column in _LATEST[table]:
            for row in connection.execute(
                f"SELECT hotkey, {column}, max(at) FROM {table} WHERE at > ? AND at <= ? AND {column} IS NOT NULL "
                "GROUP BY hotkey",
                (since, until),
            ):
                found[row["hotkey"]][column] = row[column]
    gpu_s = _gpu_seconds(connection, since, until)
    result = {}
    for hotkey, values in found.items():
        values["gpu_s"] = gpu_s[hotkey]
        result[hotkey] = Standing(**values)  # type: ignore[arg-type]
    return result


_SPENT = "outcome IN ('generated', 'rejected', 'failed') AND seconds > 0"
_COUNTS = {
    "pulls": "count(DISTINCT CASE outcome WHEN 'task' THEN task_id END) AS tasks, "
    "sum(outcome = 'cooldown') AS early, max(CASE outcome WHEN 'task' THEN at END) AS last_task_at",
    "generations": f"count(DISTINCT CASE WHEN {_SPENT} THEN task_id END) AS attempted, "
    "avg(CASE outcome WHEN 'generated' THEN candidates END) AS candidates, "
    "avg(CASE outcome WHEN 'generated' THEN score - first_score END) AS gain",
    "submissions": "count(*) AS submitted, "
    + ", ".join(f"sum(outcome = '{outcome}') AS {outcome}" for outcome in get_args(SubmissionOutcome))
    + ", avg(CASE outcome WHEN 'accepted' THEN score END) AS mean_score, "
    "total(CASE outcome WHEN 'declined' THEN wait END) AS penalty_s",
}
_LATEST = {"pulls": ("uid",), "generations": ("uid",), "submissions": ("uid", "reward")}


def _gpu_seconds(connection: sqlite3.Connection, since: float, until: float) -> dict[str, float]:
    """By hotkey, of the attempts that ended in the window."""
    ends: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for row in connection.execute(
        "SELECT endpoint, at - seconds AS start, at, id, hotkey FROM generations "
        f"WHERE at > ? AND at <= ? AND {_SPENT}",
        (since, until),
    ):
        ends[row["endpoint"]] += [(at, row["id"], row["hotkey"]) for at in (row["start"], row["at"])]
    spent: dict[str, float] = defaultdict(float)
    for of_endpoint in ends.values():
        in_work: dict[int, str] = {}
        before = 0.0
        for at, attempt, hotkey in sorted(of_endpoint):
            for other in in_work.values():
                spent[other] += (at - before) / len(in_work)
            before = at
            # Each attempt comes twice: with its start and with its end.
            if in_work.pop(attempt, None) is None:
                in_work[attempt] = hotkey
    return spent
