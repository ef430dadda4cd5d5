"""What the miner remembers: learned from the ledger at a start, and complete after a run."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import urllib.request
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from neurons.defaults import REHEARSAL_STATE
from neurons.miner.app import CompetitiveMiner
from neurons.miner.options import parse
from neurons.miner.records import standings
from neurons.miner.records.bookkeeping import Bookkeeping
from neurons.miner.records.events import Settlement, Submission
from neurons.miner.records.policy import EXPLORATION_INTERVAL_S
from neurons.miner.validators.clock import steady_time
from tests.support.ledger_events import NOW, one_task, validator, write
from tests.support.miner_harness import StandInService, accepted, options, start_network
from tests.support.waiting import until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def test_policy_and_cooldowns_outlive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    events = [event for i in range(12) for event in one_task(1, NOW - 9000 + 600 * i)]
    events += [event for i in range(12) for event in one_task(2, NOW - 9000 + 600 * i, accepted=False)]
    write(path, [*events, *one_task(3, NOW - 100, wait=400)])
    books = Bookkeeping(path, 0, least_reward=0.02, now=lambda: NOW)
    assert await books.cooldowns() == {validator(3).hotkey: NOW - 100 + 22 + 400}
    following = asyncio.create_task(books.follow_standings())
    await until(lambda: books.policy.ask_at(validator(2).hotkey) > 0)
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following
    assert books.policy.ask_at(validator(2).hotkey) == NOW - 9000 + 600 * 11 + EXPLORATION_INTERVAL_S
    assert books.policy.ask_at(validator(1).hotkey) == 0


async def test_cooldowns_outlive_a_clock_that_was_set_back(tmp_path: Path) -> None:
    """By two hours: when the wait began is unknown, so it begins now."""
    path = tmp_path / "ledger.sqlite"
    write(path, one_task(1, NOW + 7200, wait=280))
    assert await Bookkeeping(path, 0, 0.0, now=lambda: NOW).cooldowns() == {validator(1).hotkey: NOW + 280}


async def test_submissions_that_a_validator_may_still_count_outlive_a_restart(tmp_path: Path) -> None:
    path, window = tmp_path / "ledger.sqlite", 4 * 3600
    write(path, [event for at in (-50, 50, window - 100) for event in one_task(1, NOW - window + at)])
    books = Bookkeeping(path, 0, 0.0, now=lambda: NOW)
    assert [past.at for past in await books.submissions()] == [NOW - window + at + 22 for at in (50, window - 100)]


def test_what_is_settled_is_counted_once(tmp_path: Path) -> None:
    books = Bookkeeping(tmp_path / "ledger.sqlite", 0, 0.0)
    for task_id in ("a", "b"):
        books.record(Submission(validator(1), task_id, "unknown", 1.0))
    books.record(Settlement(validator(1), "a", "accepted"))
    books.record(Settlement(validator(1), "b", "unknown"))
    assert books.totals == {"submission unknown": 1, "submission accepted": 1}


async def test_a_first_start_knows_nothing_and_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    books = Bookkeeping(tmp_path / "ledger.sqlite", 0, least_reward=0.02)
    assert await books.cooldowns() == {}
    following = asyncio.create_task(books.follow_standings())
    await asyncio.sleep(0)
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following
    assert caplog.text == ""


@pytest.mark.slow
async def test_everything_that_happened_is_in_the_ledger(tmp_path: Path) -> None:
    async with StandInService() as service:
        settings = replace(options(tmp_path, service.endpoint), metrics_port=free_port())
        network = await start_network(tmp_path, service.endpoint)
        miner = CompetitiveMiner(settings)
        running = asyncio.create_task(miner.run())
        try:
            first, second, unrewarding = network.validators
            await until(lambda: accepted(first) >= 2 and accepted(second) >= 2)
            metrics = await asyncio.to_thread(scrape, settings.metrics_port)
            miner.stop()
            assert await asyncio.wait_for(running, 25) == 0
        finally:
            await asyncio.to_thread(network.__exit__)

    ledger = settings.ledger_of(network.miner_hotkey)
    found = standings.read(ledger, steady_time())
    assert set(found) == {first.hotkey, second.hotkey}
    assert unrewarding.pulls == 0
    with closing(sqlite3.connect(ledger)) as connection:
        pulls = dict(connection.execute("SELECT hotkey, count(*) FROM pulls GROUP BY hotkey"))
        generated = connection.execute("SELECT count(*) FROM generations WHERE outcome = 'generated'").fetchone()
    for theirs in (first, second):
        ours = found[theirs.hotkey]
        assert (ours.uid, ours.early) == (theirs.uid, 0)
        # The stop may have cut one off.
        assert theirs.pulls - 1 <= pulls[theirs.hotkey] <= theirs.pulls
        assert ours.accepted == ours.submitted == accepted(theirs)
        assert ours.mean_score == pytest.approx(service.score)
        assert ours.reward == pytest.approx(1500 * ours.accepted)
        assert 0 < ours.gpu_s < 60
    assert generated == (len(service.prompts),)
    with closing(sqlite3.connect(ledger)) as connection:
        endpoints = connection.execute("SELECT DISTINCT endpoint, score FROM generations").fetchall()
        whole = connection.execute(
            "SELECT count(*) FROM submissions JOIN generations USING (task_id) JOIN pulls USING (task_id)"
        ).fetchone()
    assert endpoints == [(service.endpoint, 0.76)]
    assert whole == (sum(each.submitted for each in found.values()),)
    assert f'miner_pulls_total{{outcome="task",uid="{first.uid}"}}' in metrics
    assert f'miner_endpoint_up{{endpoint="{service.endpoint}"}} 1.0' in metrics


def scrape(port: int) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_a_rehearsal_has_a_ledger_of_its_own() -> None:
    assert parse([]).ledger_of("5M") == REHEARSAL_STATE / "ledger.sqlite"
    assert parse(["--rehearsal.state", "elsewhere"]).ledger_of("5M") == Path("elsewhere/ledger.sqlite")
    assert parse(["--rehearsal.state", "elsewhere"]).spool_of("5M") == Path("elsewhere/spool")


def test_ledger_and_spool_are_one_hotkey_s_on_one_network() -> None:
    mine = parse(["--wallet.name", "mine"])
    assert mine.ledger_of("5M") == Path("data/finney-17-5M/ledger.sqlite")
    assert mine.spool_of("5M") == Path("data/finney-17-5M/spool")
    others = (
        parse(["--wallet.name", "mine", "--netuid", "18"]).spool_of("5M"),
        parse(["--wallet.name", "mine", "--network", "test"]).spool_of("5M"),
        parse(["--wallet.name", "mine", "--network", "wss://node.example:443/../.."]).spool_of("5M"),
        mine.spool_of("5N"),
    )
    assert len({mine.spool_of("5M"), *others}) == 5
    assert {path.parent.parent for path in others} == {Path("data")}
    named = parse(["--wallet.name", "mine", "--ledger", "here", "--spool", "there"])
    assert (named.ledger_of("5M"), named.spool_of("5M")) == (Path("here"), Path("there"))
