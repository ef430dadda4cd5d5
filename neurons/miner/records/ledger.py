"""The miner's memory: every pull, generation and submission, in SQLite.

`record` puts a row into memory and returns; one thread writes. A slow or full disk makes the backlog grow. Rows are
lost only beyond MAX_BACKLOG of them, and a log line says how many.
"""

from __future__ import annotations

import itertools
import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from neurons.miner.records.events import Event, Generation, Pull, Settlement
from neurons.miner.validators.clock import steady_time

MAX_AGE_S = 7 * 86_400.0
# Of each table. A network that floods the miner with events can make the file some 100 MB large.
MAX_ROWS = 200_000
PRUNE_INTERVAL_S = 3600.0
MAX_BACKLOG = 20_000
BATCH_ROWS = 500
# After a failed write.
RETRY_S = 5.0
MAX_TEXT_CHARACTERS = 120
# No number of the protocol is larger and means anything. A number outside of its range is stored as NULL.
MAX_NUMBER = 1e9
MAX_SCORE = 3.0  # a cosine of 1, divided by 0.35

SCHEMA_VERSION = 3
_COMMON = "id INTEGER PRIMARY KEY, at REAL NOT NULL, uid INTEGER NOT NULL, hotkey TEXT NOT NULL"
# `at` is in unix seconds, when the event was over; `seconds` says how long it took; `wait` is for how many seconds
# after `at` the validator may not be asked again.
_SCHEMA = f"""
CREATE TABLE pulls ({_COMMON}, outcome TEXT NOT NULL, seconds REAL, task_id TEXT, wait REAL, violations INTEGER,
    reason TEXT);
CREATE TABLE generations ({_COMMON}, outcome TEXT NOT NULL, seconds REAL, task_id TEXT, kind TEXT, score REAL,
    bytes INTEGER, endpoint TEXT, reason TEXT, candidates INTEGER, first_score REAL);
CREATE TABLE submissions ({_COMMON}, outcome TEXT NOT NULL, seconds REAL, task_id TEXT, bytes INTEGER, score REAL,
    average_score REAL, accepted_in_window INTEGER, rating REAL, reward REAL, wait REAL, reason TEXT);
CREATE INDEX pulls_at ON pulls (at);
CREATE INDEX generations_at ON generations (at);
CREATE INDEX submissions_at ON submissions (at);
PRAGMA user_version = {SCHEMA_VERSION};
"""
TABLES = ("pulls", "generations", "submissions")
# Version 1 recorded `validation_failed` as declined, and every other answer as accepted. It waited 30 s after a
# repetition. A score together with `validation_failed` came from rehearsals alone, and meant declined.
OUTCOME_OF_VERSION_1 = """CASE
    WHEN outcome = 'accepted' AND score = 0 THEN CASE WHEN wait <= 31 THEN 'unknown' ELSE 'declined' END
    WHEN outcome = 'failed' THEN CASE WHEN score > 0 THEN 'declined' ELSE 'broken' END
    WHEN outcome = 'unrated' THEN 'unknown'
    ELSE outcome END"""
# What brings a file of each version to the next one.
_MIGRATIONS = {
    1: f"UPDATE submissions SET outcome = {OUTCOME_OF_VERSION_1}, score = nullif(score, 0.0);",
    2: "ALTER TABLE generations ADD COLUMN candidates INTEGER; ALTER TABLE generations ADD COLUMN first_score REAL;",
}
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

Value = str | float | None

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What `statement` writes."""

    statement: str
    at: float
    values: tuple[Value, ...]


class Ledger:
    """Keeps events in the database at `path`, for MAX_AGE_S.

        ledger = Ledger(path)                   # never fails; nothing is read or written yet
        ledger.start()
        ledger.record(Pull(validator, "task", seconds=0.2, task_id=task.id))
        ledger.record(Generation(validator, task, "generated", seconds=18.2, score=0.81, size=len(result)))
        ledger.record(Submission(validator, task.id, "accepted", seconds=2.1, size=len(result), feedback=feedback))
        await asyncio.to_thread(ledger.close)   # writes what is left, or says what is lost

    A file that is damaged, or of a later version, is set aside, and a new one is begun. `standings` reads the file,
    from this process or another.
    """

    def __init__(self, path: Path, now: Callable[[], float] = steady_time) -> None:
        self.path = path
        self._now = now
        self._rows: deque[Row] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._dropped = 0
        self._problem = ""
        self._connection: sqlite3.Connection | None = None
        self._prune_at = 0.0
        self._thread = threading.Thread(target=self._write_rows, name="ledger", daemon=True)

    def start(self) -> None:
        """Begins to write. To be called once."""
        self._thread.start()

    def record(self, event: Event) -> None:
        """Returns at once. To be called from any thread."""
        row = _row(event, self._now())
        with self._changed:
            if len(self._rows) < MAX_BACKLOG:
                self._rows.append(row)
                self._changed.notify()
                return
            self._dropped += 1
            first = self._dropped == 1
        if first:
            log.error("Ledger: %d rows wait to be written; newer ones are lost until there is room", MAX_BACKLOG)

    @property
    def backlog(self) -> int:
        """Rows not written yet."""
        return len(self._rows)

    def close(self, timeout: float = 5.0) -> None:
        """Waits until everything is written, up to `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._rows:
            log.error("Ledger: %d rows could not be written and are lost", len(self._rows))

    def _write_rows(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._rows or self._closing)
                    batch = list(itertools.islice(self._rows, BATCH_ROWS))
                if not batch:
                    return
                problem = self._write(batch)
                with self._changed:
                    if problem is None:
                        for _ in batch:
                            self._rows.popleft()
                        dropped, self._dropped = self._dropped, 0
                    elif self._closing:
                        return
                    else:
                        self._changed.wait_for(lambda: self._closing, RETRY_S)
                if problem is None and dropped:
                    log.error("Ledger: writing again; %d rows were lost", dropped)
        except Exception:
            log.exception("Ledger: the writer broke; nothing is recorded any more")
        finally:
            self._disconnect()

    def _write(self, batch: list[Row]) -> str | None:
        """Writes all of it or nothing; returns what stood in the way. Says so in the log when that changes."""
        try:
            if self._connection is not None and not self.path.exists():
                self._disconnect()  # deleted: SQLite would go on in a file that nobody can read
            if self._connection is None:
                self._connection = self._open()
            try:
                self._prune(self._connection, now=batch[-1].at)
                with self._connection:
                    for row in batch:
                        self._connection.execute(row.statement, row.values)
            except sqlite3.Error as error:
                self._disconnect()
                if _is_damage(error):
                    self._set_aside(str(error))
                raise
        except (OSError, sqlite3.Error) as error:
            if str(error) != self._problem:
                log.error("Ledger %s: %s; rows are kept in memory meanwhile", self.path, error)
            self._problem = str(error)
            return self._problem
        if self._problem:
            log.info("Ledger %s: writing again", self.path)
            self._problem = ""
        return None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            connection = sqlite3.connect(self.path)
            try:
                reason = _begin(connection)
                if reason is None:
                    return connection
            except sqlite3.Error as error:
                connection.close()
                if not _is_damage(error):
                    raise
                reason = str(error)
            connection.close()
            self._set_aside(reason)
        raise sqlite3.OperationalError("a new database can not be begun")

    def _set_aside(self, reason: str) -> None:
        """Replaces the one set aside before, so that repeated damage can not fill the disk."""
        aside = self.path.with_name(self.path.name + ".damaged")
        log.error("Ledger %s can not be used (%s): set aside as %s, a new one is begun", self.path, reason, aside)
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _prune(self, connection: sqlite3.Connection, now: float) -> None:
        if now < self._prune_at:
            return
        self._prune_at = now + PRUNE_INTERVAL_S
        with connection:
            for table in TABLES:
                connection.execute(
                    f"DELETE FROM {table} WHERE at < ? OR id <= (SELECT max(id) FROM {table}) - ?",
                    (now - MAX_AGE_S, MAX_ROWS),
                )

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _begin(connection: sqlite3.Connection) -> str | None:
    """Makes the connection ready for writing; returns why the file can not be used. Raises sqlite3.Error."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if not 0 <= version <= SCHEMA_VERSION:
        return f"version {version}, this miner writes {SCHEMA_VERSION}"
    check = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if check != "ok":
        return str(check)
    if version == 0:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return "not a ledger"
        connection.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    elif version < SCHEMA_VERSION:
        steps = " ".join(_MIGRATIONS[step] for step in range(version, SCHEMA_VERSION))
        connection.executescript(f"BEGIN; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    # Readers and the writer do not wait for one another.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return None


def _is_damage(error: sqlite3.Error) -> bool:
    # The low byte of an extended code is its kind.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _row(event: Event, now: float) -> Row:
    who: tuple[Value, ...] = (event.validator.uid, _text(event.validator.hotkey))
    if isinstance(event, Settlement):
        return Row(_SETTLE, now, (event.outcome, who[1], _text(event.task_id)))
    head: tuple[Value, ...] = (*who, event.outcome, _within(0.0, event.seconds, MAX_NUMBER))
    reason = _text(event.reason)
    if isinstance(event, Generation):
        task = event.task
        score = _within(-MAX_SCORE, event.score, MAX_SCORE)
        first = _within(-MAX_SCORE, event.first_score, MAX_SCORE)
        values = (*head, _text(task.id), task.type, score, event.size, _text(event.endpoint), reason)
        values += (event.candidates, first)
        return _inserted("generations", now, values)
    wait = None if event.ask_again_at is None else _within(0.0, event.ask_again_at - now, MAX_NUMBER)
    if isinstance(event, Pull):
        violations = _within(0, event.violations, MAX_NUMBER)
        return _inserted("pulls", now, (*head, _text(event.task_id), wait, violations, reason))
    feedback = event.feedback
    told: tuple[Value, ...] = (None,) * 5
    if feedback is not None:
        told = (
            # A validator that tells no score says 0.
            _within(-MAX_SCORE, feedback.task_fidelity_score or None, MAX_SCORE),
            _within(-MAX_SCORE, feedback.average_fidelity_score, MAX_SCORE),
            _within(0, feedback.generations_within_the_window, MAX_NUMBER),
            _within(-MAX_NUMBER, feedback.current_duel_rating, MAX_NUMBER),
            _within(-MAX_NUMBER, feedback.current_miner_reward, MAX_NUMBER),
        )
    return _inserted("submissions", now, (*head, _text(event.task_id), event.size, *told, wait, reason))


_SETTLE = """UPDATE submissions SET outcome = ? WHERE id =
    (SELECT max(id) FROM submissions WHERE outcome = 'unknown' AND hotkey = ? AND task_id = ?)"""


def _inserted(table: str, at: float, values: tuple[Value, ...]) -> Row:
    """`values` are in the order of the table's columns, after `id` and `at`."""
    return Row(f"INSERT INTO {table} VALUES (NULL, ?{', ?' * len(values)})", at, (at, *values))


def _within(low: float, value: float | None, high: float) -> float | None:
    """`value`, or None where it is not a number from `low` to `high`."""
    # Compares and nothing else: a stranger's integer may be too large for a float, and NaN is within nothing.
    return value if value is not None and low <= value <= high else None


def _text(text: str) -> str:
    """On one line, without terminal escapes, of bounded length."""
    characters = (c if c.isprintable() else ascii(c)[1:-1] for c in text[:MAX_TEXT_CHARACTERS])
    return "".join(characters)[:MAX_TEXT_CHARACTERS]
