"""The metrics, as Prometheus reads them."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from neurons.miner.records.events import Generation, Pull, Settlement, Submission
from neurons.miner.records.metrics import Metrics, Snapshot
from neurons.protocol import TextTask
from tests.support.ledger_events import validator

TASK = TextTask(id="t", prompt="p")


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    result = Metrics()
    yield result
    result.close()


def scrape(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_events_and_snapshot_are_served(metrics: Metrics) -> None:
    metrics.record(Pull(validator(7), "task", 0.3, "t"))
    metrics.record(Pull(validator(7), "failed", 12.0))
    metrics.record(Generation(validator(7), TASK, "generated", 18.0, 0.8, 100))
    metrics.record(Submission(validator(7), "t", "accepted", 2.5, 100))
    metrics.show(
        Snapshot(
            queued=2,
            ages=[3.0, 41.0],
            cooldowns={7: 120.5, 8: -1.0},
            endpoints={"http://127.0.0.1:10006": True, "http://127.0.0.1:10008": False},
            ledger_backlog=5,
            clock_behind=37.5,
            uid=42,
            incentive=0.0125,
        )
    )
    port = metrics.serve(0)
    assert port is not None
    found = scrape(port)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    assert value("miner_pulls_total", uid="7", outcome="task") == 1
    assert value("miner_pulls_total", uid="7", outcome="failed") == 1
    assert value("miner_generations_total", kind="text", outcome="generated") == 1
    assert value("miner_submissions_total", uid="7", outcome="accepted") == 1
    assert value("miner_pull_seconds_sum") == 12.3
    assert value("miner_pull_seconds_bucket", le="0.25") == 0
    assert value("miner_pull_seconds_bucket", le="0.5") == 1
    assert value("miner_generation_seconds_bucket", kind="text", le="30.0") == 1
    assert value("miner_submission_seconds_bucket", le="4.0") == 1
    assert value("miner_queue_length") == 2
    assert value("miner_held_tasks") == 2
    assert value("miner_held_task_oldest_seconds") == 41
    assert value("miner_held_task_mean_seconds") == 22
    assert value("miner_cooldown_seconds", uid="7") == 120.5
    assert value("miner_cooldown_seconds", uid="8") == 0
    assert value("miner_endpoint_up", endpoint="http://127.0.0.1:10006") == 1
    assert value("miner_endpoint_up", endpoint="http://127.0.0.1:10008") == 0
    assert value("miner_ledger_backlog_rows") == 5
    assert value("miner_clock_behind_seconds") == 37.5
    assert value("miner_incentive") == 0.0125

    metrics.show(Snapshot())
    gone = {"miner_cooldown_seconds", "miner_clock_behind_seconds", "miner_incentive"}
    assert not any(name in gone for name, _ in scrape(port))


def test_a_result_is_counted_when_it_is_known_what_became_of_it(metrics: Metrics) -> None:
    def values() -> list[float | None]:
        names = [("miner_submissions_total", {"uid": "7", "outcome": each}) for each in ("unknown", "accepted")]
        names.append(("miner_submissions_unsettled", {}))
        return [metrics.registry.get_sample_value(*name) for name in names]

    metrics.record(Submission(validator(7), "t", "unknown", 2.5, 100))
    metrics.record(Submission(validator(7), "u", "unknown", 2.5, 100))
    assert values() == [None, None, 2]
    metrics.record(Settlement(validator(7), "t", "accepted"))
    assert values() == [None, 1, 1]
    metrics.record(Settlement(validator(7), "u", "unknown"))
    assert values() == [1, 1, 0]


def test_two_miners_in_one_process_do_not_meet(metrics: Metrics) -> None:
    other = Metrics()
    metrics.record(Pull(validator(1), "task", 0.1))
    labels = {"uid": "1", "outcome": "task"}
    assert metrics.registry.get_sample_value("miner_pulls_total", labels) == 1
    assert other.registry.get_sample_value("miner_pulls_total", labels) is None
    assert REGISTRY.get_sample_value("miner_pulls_total", labels) is None


def test_a_port_that_is_taken_is_a_log_line(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert metrics.serve(server.getsockname()[1]) is None
    assert "can not listen on 127.0.0.1" in caplog.text


def test_only_this_machine_is_served(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[tuple[str, int]] = []
    bind = socket.socket.bind

    def recorded(self: socket.socket, address: tuple[str, int]) -> None:
        bound.append(address)
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", recorded)
    metrics.serve(0)
    assert [address[0] for address in bound] == ["127.0.0.1"]


def test_a_foreign_name_is_refused(metrics: Metrics) -> None:
    """As a website's would be that has come to stand for this machine's address."""
    port = metrics.serve(0)
    statuses = []
    for host in (f"127.0.0.1:{port}", "localhost", f"evil.example:{port}", "localhost.evil.example"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Host": host})
        try:
            with urllib.request.urlopen(request) as answer:
                statuses.append(answer.status)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)
    assert statuses == [200, 200, 421, 421]


def test_the_port_is_free_again_afterwards(metrics: Metrics) -> None:
    port = metrics.serve(0)
    assert port is not None
    metrics.close()
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_spool_and_disk_are_looked_at_when_asked(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "spool")
    port = metrics.serve(0)
    assert port is not None
    try:
        assert not any(name.startswith(("miner_spool", "miner_disk")) for name, _ in scrape(port))  # no folder yet
        (tmp_path / "spool").mkdir()
        (tmp_path / "spool/a.result").write_bytes(b"x" * 70)
        (tmp_path / "spool/b.result").write_bytes(b"x" * 30)
        (tmp_path / "spool/lock").write_bytes(b"")
        found = {name: value for (name, _), value in scrape(port).items()}
        assert found["miner_spool_results"] == 2
        assert found["miner_spool_bytes"] == 100
        assert found["miner_disk_free_bytes"] > 0
    finally:
        metrics.close()
