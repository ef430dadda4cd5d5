"""The report on a ledger, be it full, empty, absent, or being written."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from neurons.miner.records.events import Generation, Pull, Submission, SubmissionOutcome
from neurons.miner.records.ledger import Ledger
from neurons.protocol import TextTask
from scripts.ops import report
from tests.support.ledger_events import NOW, one_task, validator, write


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    events = [event for i in range(40) for event in one_task(1, NOW - 300 - 300 * i, reward=60_000.0)]
    events += [event for i in range(10) for event in one_task(22, NOW - 350 - 600 * i, score=0.8, reward=15_000.0)]
    events += [event for i in range(4) for event in one_task(22, NOW - 7000 - 900 * i, accepted=False)]
    events += [(NOW - 9000, Pull(validator(22), "cooldown", 0.1, ask_again_at=NOW - 8000))]
    write(path, [*events, *one_task(1, NOW - report.WINDOW_S - 100)])
    return path


def printed(result: report.Report) -> list[list[str]]:
    """The table's lines, by words."""
    output = io.StringIO()
    Console(file=output, width=80).print(report.table(result))
    return [line.split() for line in output.getvalue().splitlines()]


def test_table(ledger: Path) -> None:
    lines = printed(report.read(ledger, NOW, report.WINDOW_S))
    # tasks, accepted, rate, mean score, reward, seconds per task, of the ceiling (48), violations, penalty minutes
    assert ["1", "hotke", "40", "40", "100", "%", "0.70", "60,000", "20.0", "83", "%", "0", "0"] in lines
    assert ["22", "hotke", "14", "10", "71", "%", "0.80", "15,000", "20.0", "21", "%", "1", "19"] in lines
    assert ["all", "2", "54", "50", "93", "%", "0.72", "75,000", "20.0", "52", "%", "1", "19"] in lines


def test_what_became_of_every_result_is_said(ledger: Path, tmp_path: Path) -> None:
    """And a validator that declines everything is none that accepts everything."""
    path = tmp_path / "l"
    events = [event for i in range(5) for event in one_task(3, NOW - 3000 + 300 * i, accepted=False)]
    for number, outcome in enumerate(get_args(SubmissionOutcome)):
        events.append((NOW - 100 - number, Submission(validator(4), outcome, outcome, 1.0, 10)))
    write(path, events)
    result = report.read(path, NOW, report.WINDOW_S)
    output = io.StringIO()
    Console(file=output, width=80).print(report.outcomes(result))
    lines = [line.split() for line in output.getvalue().splitlines()]
    names = ["accepted", "declined", "broken", "empty", "refused", "given", "up", "unknown"]
    assert ["validator", "submitted", *names] in lines
    assert ["3", "hotke", "5", "0", "5", "0", "0", "0", "0", "0"] in lines
    assert ["4", "hotke", "7", *"1111111"] in lines
    assert ["all", "2", "12", "1", "6", "1", "1", "1", "1", "1"] in lines
    assert ["3", "hotke", "5", "0", "0", "%", "-"] in [line[:7] for line in printed(result)]
    report.plot(result, tmp_path / "plot.png")
    pixels = matplotlib.image.imread(tmp_path / "plot.png")[..., :3]
    for colour in report.LOST.values():
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=-1) < 0.01).sum() > 20, colour


def test_an_old_ledger_is_reported_in_today_s_words(tmp_path: Path) -> None:
    old = Path(__file__).parents[2] / "golden" / "ledger_v1.sqlite"
    (tmp_path / "l").write_bytes(old.read_bytes())
    result = report.read(tmp_path / "l", NOW, report.WINDOW_S)
    assert {name: len(times) for name, times in result.lost.items()} == {
        **{"declined": 2, "broken": 1, "unknown": 2, "empty": 1}
    }
    assert [len(points) for points in result.accepted.values()] == [1]


def test_the_ceiling_is_that_of_the_time_which_the_ledger_covers(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    write(path, [event for i in range(12) for event in one_task(1, NOW - 3600 + 300 * i)])
    result = report.read(path, NOW, report.WINDOW_S)
    assert result.ceiling == 12
    assert ["The", "ledger", "begins", "1.0", "h", "ago"] in printed(result)


def test_plot_shows_what_was_accepted(ledger: Path, tmp_path: Path) -> None:
    result = report.read(ledger, NOW, report.WINDOW_S)
    report.plot(result, tmp_path / "plot.png")
    pixels = matplotlib.image.imread(tmp_path / "plot.png")[..., :3]
    for colour in report.PALETTE[:2]:
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(axis=-1) < 0.01).sum() > 2000
    assert (np.abs(pixels - 1).max(axis=-1) < 0.01).mean() > 0.4


def test_many_validators_are_drawn_as_others(tmp_path: Path) -> None:
    write(tmp_path / "l", [event for uid in range(30) for event in one_task(uid, NOW - 3000 - uid)])
    result = report.read(tmp_path / "l", NOW, report.WINDOW_S)
    assert list(report._colours(result)) == [*range(report.COLOURED_VALIDATORS - 1), report.OTHERS]
    report.plot(result, tmp_path / "plot.png")


def test_empty_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "l", one_task(1, time.time() - 2 * report.WINDOW_S))
    assert report.main(["--ledger", str(tmp_path / "l"), "--plot", str(tmp_path / "new" / "plot.png")]) == 0
    assert "all 0" in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "new" / "plot.png").shape[2] == 4


def test_a_clock_that_was_set_back_hides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ahead = time.time() + 7200
    write(tmp_path / "l", [event for i in range(7) for event in one_task(3, ahead - 100 * i)])
    assert report.main(["--ledger", str(tmp_path / "l"), "--plot", str(tmp_path / "plot.png")]) == 0
    assert ["all", "1", "7"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]


def test_no_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").touch()
        assert report.main(["--ledger", str(path), "--plot", str(tmp_path / "plot.png")]) == 1
        assert "No ledger to read" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "plot.png").exists()


def test_the_newest_ledger_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 1
    assert "No ledger to read" in capsys.readouterr().err
    now = time.time()
    practice, older, newer = (
        Path(f"data/{name}/ledger.sqlite") for name in ("rehearsal", "finney-17-5N", "test-17-5A")
    )
    write(practice, one_task(1, now - 100))
    assert report.main([]) == 0
    assert f"Ledger: {practice} (a rehearsal" in capsys.readouterr().out
    write(newer, one_task(2, now - 200))
    write(older, one_task(3, now - 300))
    assert report.main([]) == 0
    assert f"Ledger: {newer}\n" in (said := capsys.readouterr().out)
    assert "2 hotke" in said
    assert said.index(str(newer)) < said.index(str(older)) < said.index(str(practice))
    assert report.main(["--ledger", str(older)]) == 0
    assert f"Ledger: {older}\n" in (said := capsys.readouterr().out)
    assert str(newer) not in said


def test_while_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Ledger(tmp_path / "l")
    writer.start()
    try:
        writer.record(Pull(validator(5), "task", 0.1, "first"))
        while writer.backlog:
            time.sleep(0.001)
        for i in range(5000):
            writer.record(Pull(validator(5), "task", 0.1, str(i)))
        assert report.main(["--ledger", str(tmp_path / "l"), "--plot", str(tmp_path / "plot.png")]) == 0
    finally:
        writer.close()
    assert "5 hotke" in capsys.readouterr().out


def test_hostile_text_is_shown_as_it_is(tmp_path: Path) -> None:
    """A hotkey is a stranger's text where the chain is not genuine."""
    write(tmp_path / "l", [(NOW, Pull(replace(validator(1), hotkey="[red]"), "task", 0.1))])
    assert ["1", "[red]"] in [line[:2] for line in printed(report.read(tmp_path / "l", NOW, 60.0))]


def test_candidates_and_the_share_of_time_that_services_work_are_told(tmp_path: Path) -> None:
    path = tmp_path / "l"
    events = [event for i in range(12) for event in one_task(1, NOW - 3600 + 300 * i, seconds=30.0)]
    task = TextTask(id="t", prompt="a red cube")
    done = Generation(validator(2), task, "generated", 60.0, 0.8, 10, "http://127.0.0.1:10006", "", 5, 0.7)
    write(path, [*events, (NOW - 100, done)])
    result = report.read(path, NOW, 3600.0)
    assert result.busy == pytest.approx((12 * 30 + 60) / 3600)
    output = io.StringIO()
    Console(file=output, width=80).print(report.candidates(result))
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["1", "hotke", "1.0", "-"] in lines
    assert ["2", "hotke", "5.0", "0.100"] in lines
    assert "busy: 12 %" in output.getvalue()
