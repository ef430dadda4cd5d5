"""The ledger: what it keeps, what it refuses to believe, and what it does on a bad disk."""

from __future__ import annotations

import itertools
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neurons.miner.records import ledger as ledgers
from neurons.miner.records import standings
from neurons.miner.records.events import Event, Generation, Pull, Settlement, Submission, SubmissionOutcome
from neurons.miner.records.ledger import Ledger
from neurons.protocol import Feedback, TextTask
from tests.support.ledger_events import NOW, one_task, validator, write

PULL = Pull(validator(1), "task", 0.2, "id")


def rows(path: Path, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"SELECT {columns} FROM {table} ORDER BY id").fetchall()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "ledger.sqlite"


@pytest.fixture
def started(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path, now=lambda: NOW)
    ledger.start()
    yield ledger
    ledger.close()


def test_keeps_every_field(path: Path, started: Ledger) -> None:
    task = TextTask(id="t", prompt="a red cube")
    feedback = Feedback(
        task_fidelity_score=0.71,
        average_fidelity_score=0.69,
        generations_within_the_window=12,
        current_duel_rating=1512.5,
        current_miner_reward=18150.0,
    )
    started.record(Pull(validator(1), "cooldown", 0.1, "", NOW + 60, 3, "too early"))
    started.record(Generation(validator(1), task, "rejected", 18.5, 0.42, 0, "http://127.0.0.1:10006", "score", 7, 0.3))
    started.record(Submission(validator(1), "t", "accepted", 2.5, 7_000_000, feedback, NOW + 270))
    started.close()
    head = (1, NOW, 1, "hotkey1")
    assert rows(path, "pulls") == [(*head, "cooldown", 0.1, "", 60.0, 3, "too early")]
    assert rows(path, "generations") == [
        (*head, "rejected", 18.5, "t", "text", 0.42, 0, "http://127.0.0.1:10006", "score", 7, 0.3)
    ]
    told = (0.71, 0.69, 12, 1512.5, 18150.0)
    assert rows(path, "submissions") == [(*head, "accepted", 2.5, "t", 7_000_000, *told, 270.0, "")]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (ledgers.SCHEMA_VERSION,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(("wait", "kept"), [(0.5, 0.5), (0.0, 0.0), (-1.0, None), (2e9, None)])
def test_a_wait_is_one_that_is_still_to_come(path: Path, started: Ledger, wait: float, kept: float | None) -> None:
    started.record(Pull(validator(1), "cooldown", 0.1, ask_again_at=NOW + wait))
    started.close()
    assert rows(path, "pulls", "wait") == [(kept,)]


def test_goes_on_in_the_same_file(path: Path) -> None:
    for _ in range(2):
        write(path, one_task(1, NOW))
    assert len(rows(path, "pulls")) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300])
def test_numbers_that_mean_nothing_are_no_numbers(path: Path, started: Ledger, value: float) -> None:
    # Past all checks of the protocol.
    feedback = Feedback.model_construct(
        task_fidelity_score=value, average_fidelity_score=value, current_miner_reward=value
    )
    started.record(Submission(validator(1), "t", "accepted", value, 1, feedback, ask_again_at=value))
    started.record(Generation(validator(1), TextTask(id="t", prompt="p"), "generated", 1.0, score=value))
    started.close()
    assert rows(path, "submissions", "seconds, score, average_score, reward, wait") == [(None,) * 5]
    assert rows(path, "generations", "score") == [(None,)]


_NUMBER = st.one_of(st.floats(), st.integers())


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=500), number=_NUMBER, whole=st.integers(), size=st.integers(0, 10**9))
def test_any_event_makes_a_row_that_sqlite_takes(text: str, number: float, whole: int, size: int) -> None:
    # Surrogates come in by JSON, and hypothesis leaves them out of text() as a rule.
    text += "\ud800\u202e\x1b[2J\n"
    feedback = Feedback.model_construct(
        task_fidelity_score=number, generations_within_the_window=whole, current_miner_reward=number
    )
    events: list[Event] = [
        Pull(validator(1), "failed", 1.0, text, number, whole, text),
        Generation(validator(1), TextTask.model_construct(id=text, prompt=text), "failed", 1.0, number, size, text),
        Submission(validator(1), text, "unknown", 1.0, size, feedback, number, text),
        Settlement(validator(1), text, "accepted"),
    ]
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(ledgers._SCHEMA)
        for event in events:
            row = ledgers._row(event, NOW)
            connection.execute(row.statement, row.values)
        stored = [connection.execute(f"SELECT * FROM {table}").fetchone() for table in ledgers.TABLES]
        assert stored[-1][4] == "accepted"
        for value in itertools.chain(*stored):
            assert not isinstance(value, str) or (value.isprintable() and len(value) <= 120)
            assert not isinstance(value, float | int) or abs(value) <= NOW


def test_prunes_what_is_old_and_what_is_too_much(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = one_task(1, NOW - ledgers.MAX_AGE_S - 100)
    write(path, [*old, *one_task(2, NOW)])
    write(path, one_task(3, NOW + 60))  # a new process prunes first
    assert rows(path, "pulls", "uid") == rows(path, "submissions", "uid") == [(2,), (3,)]
    monkeypatch.setattr(ledgers, "MAX_ROWS", 5)
    write(path, [event for i in range(10) for event in one_task(i, NOW + 100 + i)])
    write(path, one_task(99, NOW + 7200))
    assert rows(path, "pulls", "uid") == [(5,), (6,), (7,), (8,), (9,), (99,)]


@pytest.mark.parametrize(
    "content",
    [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096],
    ids=["text", "damaged"],
)
def test_a_damaged_file_is_set_aside(path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    write(path, one_task(1, NOW))
    assert len(rows(path, "pulls")) == 1
    assert path.with_name("ledger.sqlite.damaged").read_bytes() == content
    assert "set aside" in caplog.text


def test_a_file_of_another_version_is_set_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, one_task(1, NOW))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    write(path, one_task(2, NOW))
    assert rows(path, "pulls", "uid") == [(2,)]
    assert f"version 99, this miner writes {ledgers.SCHEMA_VERSION}" in caplog.text


def test_damaged_pages_are_found_at_the_start(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(path, [event for i in range(500) for event in one_task(1, NOW + i)])
    content = path.read_bytes()
    path.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    write(path, one_task(2, NOW))
    assert rows(path, "pulls", "uid") == [(2,)]
    assert "set aside" in caplog.text


def test_damage_while_it_runs_loses_no_new_row(
    path: Path, started: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledgers, "RETRY_S", 0.01)
    started.record(PULL)
    wait_until(lambda: started.backlog == 0)
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT_INDEX
    intact = Ledger._prune
    errors = [error]

    def prune(ledger: Ledger, connection: sqlite3.Connection, now: float) -> None:
        if errors:
            raise errors.pop()
        intact(ledger, connection, now)

    monkeypatch.setattr(Ledger, "_prune", prune)
    started.record(Pull(validator(2), "task", 0.2))
    wait_until(lambda: started.backlog == 0)
    assert rows(path, "pulls", "uid") == [(2,)]
    assert rows(path.with_name("ledger.sqlite.damaged"), "pulls", "uid") == [(1,)]
    assert "set aside" in caplog.text


def test_damage_that_can_not_be_set_aside_is_tried_again(
    path: Path, started: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledgers, "RETRY_S", 0.01)
    started.record(PULL)
    wait_until(lambda: started.backlog == 0)
    aside = path.with_name("ledger.sqlite.damaged")
    aside.mkdir()
    path.write_bytes(b"\0" * path.stat().st_size)
    for suffix in ("-wal", "-shm"):
        damaged = path.with_name(path.name + suffix)
        damaged.write_bytes(b"\0" * damaged.stat().st_size)
    started.record(Pull(validator(2), "task", 0.2))
    wait_until(lambda: "kept in memory meanwhile" in caplog.text)
    aside.rmdir()
    wait_until(lambda: started.backlog == 0)
    assert rows(path, "pulls", "uid") == [(2,)]


def test_a_file_that_is_deleted_is_begun_anew(path: Path, started: Ledger) -> None:
    started.record(PULL)
    wait_until(lambda: started.backlog == 0)
    path.unlink()
    started.record(Pull(validator(2), "task", 0.2))
    wait_until(lambda: started.backlog == 0)
    assert rows(path, "pulls", "uid") == [(2,)]


class Disk:
    """Stands between the ledger and its file: full, or as slow as one likes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self.fast = threading.Event()
        self.fast.set()
        write = Ledger._prune

        def prune(ledger: Ledger, connection: sqlite3.Connection, now: float) -> None:
            self.fast.wait()
            # What SQLite itself does when the file can not grow.
            size = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {size if self.full else 1 << 30}")
            write(ledger, connection, now)

        monkeypatch.setattr(Ledger, "_prune", prune)


def test_a_full_disk_is_a_log_line_and_no_row_is_lost(
    path: Path, started: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(ledgers, "RETRY_S", 0.01)
    disk = Disk(monkeypatch)
    disk.full = True
    for _ in range(1000):
        started.record(PULL)
    wait_until(lambda: "database or disk is full" in caplog.text)
    time_of_first = len(caplog.records)
    started.record(PULL)
    assert started.backlog > 0
    disk.full = False
    wait_until(lambda: started.backlog == 0)
    assert len(rows(path, "pulls")) == 1001
    assert "writing again" in caplog.text
    assert len(caplog.records) == time_of_first + 1  # not one line per attempt


def test_a_slow_disk_makes_nobody_wait_and_losses_are_told(
    path: Path, started: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledgers, "MAX_BACKLOG", 100)
    disk = Disk(monkeypatch)
    disk.fast.clear()
    for _ in range(130):  # would hang here if it waited for the disk
        started.record(PULL)
    assert started.backlog == 100
    assert "newer ones are lost" in caplog.text
    disk.fast.set()
    wait_until(lambda: "30 rows were lost" in caplog.text)
    wait_until(lambda: started.backlog == 0)  # the first batch may have begun before the last row came
    assert len(rows(path, "pulls")) == 100


def test_an_impossible_folder_is_a_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    ledger = Ledger(tmp_path / "file" / "ledger.sqlite")
    ledger.start()
    ledger.record(PULL)
    wait_until(lambda: "kept in memory meanwhile" in caplog.text)
    ledger.close()
    assert "1 rows could not be written and are lost" in caplog.text


@pytest.mark.parametrize("outcome", ["accepted", "broken", "unknown"])
def test_a_settlement_changes_the_one_unknown_row(path: Path, started: Ledger, outcome: SubmissionOutcome) -> None:
    twice: tuple[str, SubmissionOutcome] = ("a", "unknown")
    known: list[tuple[str, SubmissionOutcome]] = [twice, twice, ("b", "unknown"), ("c", "declined")]
    for task_id, first in known:
        started.record(Submission(validator(1), task_id, first, 2.0, 1000))
    started.record(Submission(validator(2), "a", "unknown", 2.0, 1000))
    started.record(Settlement(validator(1), "a", outcome))
    started.record(Settlement(validator(1), "c", "accepted"))  # is known already
    started.close()
    assert rows(path, "submissions", "uid, task_id, outcome") == [
        (1, "a", "unknown"),  # the same id, given out before
        (1, "a", outcome),
        (1, "b", "unknown"),
        (1, "c", "declined"),
        (2, "a", "unknown"),
    ]
    assert standings.read(path, NOW)["hotkey1"].known == (1 if outcome == "unknown" else 2)


def test_no_score_is_told_of_what_is_declined(path: Path) -> None:
    write(path, [*one_task(1, NOW - 600), *one_task(1, NOW - 300, accepted=False)])
    assert rows(path, "submissions", "outcome, score") == [("accepted", 0.7), ("declined", None)]


# What the code before schema version 2 wrote for answers of public validators; see the ids for what they were.
OLD = Path(__file__).parents[4] / "golden" / "ledger_v1.sqlite"
OLD_OUTCOMES = [
    ("1-0", "accepted", 0.75),
    ("1-1", "declined", None),  # was accepted with score 0, and 900 s to wait
    ("1-2", "broken", None),  # was failed
    ("1-3", "unknown", None),  # a repetition: was accepted with score 0, and 30 s to wait
    ("1-4", "unknown", None),  # a repetition: was unrated
    ("1-5", "empty", None),
    ("2-0", "declined", 0.35),  # a rehearsal's of that time: was failed
]


def test_an_old_ledger_goes_on_in_today_s_words(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(OLD.read_bytes())
    write(path, one_task(1, NOW))
    assert rows(path, "submissions", "task_id, outcome, score")[:-1] == OLD_OUTCOMES
    assert not path.with_name("ledger.sqlite.damaged").exists()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (ledgers.SCHEMA_VERSION,)


def test_a_ledger_without_candidates_is_read_and_goes_on(path: Path) -> None:
    write(path, one_task(1, NOW - 60))
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "ALTER TABLE generations DROP COLUMN candidates; ALTER TABLE generations DROP COLUMN first_score; "
            "PRAGMA user_version = 2;"
        )
    (standing,) = standings.read(path, NOW).values()
    assert (standing.submitted, standing.candidates, standing.gain) == (1, None, None)
    task = TextTask(id="t", prompt="a red cube")
    write(path, [(NOW, Generation(validator(1), task, "generated", 5.0, 0.8, candidates=4, first_score=0.7))])
    (standing,) = standings.read(path, NOW).values()
    assert standing.candidates == 4
    assert standing.gain == pytest.approx(0.1)


def test_an_old_ledger_is_read_in_today_s_words_before_a_miner_has_opened_it(tmp_path: Path) -> None:
    old = tmp_path / "ledger.sqlite"
    old.write_bytes(OLD.read_bytes())
    found = standings.read(old, NOW)
    one, two = found["hotkey1"], found["hotkey2"]
    assert (one.submitted, one.accepted, one.declined, one.broken, one.empty, one.unknown) == (6, 1, 1, 1, 1, 2)
    assert (two.submitted, two.declined, one.mean_score, one.penalty_s) == (1, 1, 0.75, 878.0)
    assert old.read_bytes() == OLD.read_bytes()


def test_standings(path: Path) -> None:
    early = Pull(validator(1), "cooldown", 0.1, ask_again_at=NOW - 940, violations=7)
    failed = Pull(validator(1), "failed", 12.0, reason="no answer")
    write(
        path,
        [
            *one_task(1, NOW - 2000, wait=300, score=0.8, reward=1.0),
            (NOW - 1000, early),
            (NOW - 999, failed),
            *one_task(1, NOW - 900, wait=878, accepted=False, seconds=30, reward=2.0),
            *one_task(1, NOW - 5 * 3600, wait=3600 + 100),  # before the window
            *one_task(2, NOW - 100),
        ],
    )
    found = standings.read(path, NOW)
    assert set(found) == {"hotkey1", "hotkey2"}
    one = found["hotkey1"]
    assert (one.uid, one.tasks, one.early) == (1, 2, 1)
    assert (one.attempted, one.submitted, one.accepted, one.declined, one.gpu_s) == (2, 2, 1, 1, 50.0)
    assert one.acceptance_rate == 0.5
    assert one.mean_score == pytest.approx(0.8)
    assert (one.reward, one.penalty_s, one.last_task_at) == (2.0, 878.0, NOW - 900)


def test_tasks_that_are_generated_together_share_the_time(path: Path) -> None:
    write(
        path,
        [
            *one_task(1, NOW - 100, seconds=30),  # 10 s alone, 20 s with one or two others
            *one_task(2, NOW - 90, seconds=30),
            *one_task(3, NOW - 80, seconds=40),  # the last 20 s alone
        ],
    )
    found = standings.read(path, NOW)
    spent = [found[f"hotkey{uid}"].gpu_s for uid in (1, 2, 3)]
    assert spent == pytest.approx([10 + 5 + 10 / 3, 5 + 10 / 3 + 5, 10 / 3 + 5 + 20])
    assert sum(spent) == pytest.approx(60)


def test_services_work_side_by_side(path: Path) -> None:
    task = TextTask(id="t", prompt="p")
    attempts = [(f"http://{i}", Generation(validator(i), task, "failed", 30.0, endpoint=f"http://{i}")) for i in (1, 2)]
    write(path, [(NOW - 10, attempt) for _, attempt in attempts])
    assert [each.gpu_s for each in standings.read(path, NOW).values()] == [30.0, 30.0]


def test_a_task_that_is_given_out_again_is_one_task(path: Path) -> None:
    write(path, [(NOW - 20, PULL), (NOW - 10, PULL)])
    assert standings.read(path, NOW)["hotkey1"].tasks == 1


@pytest.mark.parametrize("outcome", get_args(SubmissionOutcome))
def test_each_outcome_is_counted_as_what_it_is(path: Path, outcome: SubmissionOutcome) -> None:
    told = Feedback(current_miner_reward=3000.0)
    other = Submission(validator(1), "t", outcome, 2.0, 1000, told, NOW + 330)
    write(path, [*one_task(1, NOW - 300), (NOW, other)])
    found = standings.read(path, NOW)["hotkey1"]
    counts = {name: getattr(found, name) for name in get_args(SubmissionOutcome)}
    assert counts == {**dict.fromkeys(counts, 0), "accepted": 1, outcome: 1 + (outcome == "accepted")}
    assert (found.submitted, found.known) == (2, 2 - (outcome == "unknown"))
    assert found.acceptance_rate == {"accepted": 1.0, "unknown": 1.0}.get(outcome, 0.5)
    assert (found.mean_score, found.reward) == (0.7, 3000.0)
    assert found.penalty_s == (330.0 if outcome == "declined" else 0.0)


def test_only_a_generation_in_the_window(path: Path) -> None:
    write(path, one_task(1, NOW - 10, seconds=20))
    found = standings.read(path, NOW - 5 + standings.WINDOW_S)
    assert (found["hotkey1"].uid, found["hotkey1"].tasks, found["hotkey1"].attempted) == (1, 0, 1)


def test_reading_while_it_is_written(path: Path, started: Ledger) -> None:
    started.record(PULL)
    wait_until(lambda: started.backlog == 0)
    assert standings.read(path, NOW)["hotkey1"].tasks == 1
    started.record(Pull(validator(1), "task", 0.2, "another"))
    wait_until(lambda: started.backlog == 0)
    assert standings.read(path, NOW)["hotkey1"].tasks == 2


def test_what_is_written_between_two_queries_is_not_half_read(path: Path, started: Ledger) -> None:
    written = 0

    def write_another(_: str = "") -> None:
        nonlocal written
        written += 1
        started.record(Pull(validator(written), "task", 0.2, "id"))
        wait_until(lambda: started.backlog == 0)

    write_another()
    with closing(standings.connect(path)) as connection:
        connection.execute("SELECT * FROM pulls").fetchone()
        connection.set_trace_callback(write_another)  # before each query
        assert set(standings.standings(connection, NOW, 3600.0)) == {"hotkey1"}
    assert len(standings.read(path, NOW)) == written > 3


def test_no_ledger_to_read(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        standings.read(tmp_path / "none.sqlite", NOW)
