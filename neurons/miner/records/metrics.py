"""The miner's Prometheus metrics, on a port of this machine.

Counters and histograms follow the events. Gauges (queue, ages, cooldowns) are passed as one snapshot from the event
loop to the server's thread.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from neurons.miner.records.events import Event, Generation, Pull, Settlement

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
ACTIVITY = "/activity"
# Buckets in seconds, up to the protocol's time-outs for pulls and submissions, and the service's for generations.
_PULL_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 12)
_GENERATION_BUCKETS_S = (1, 2, 4, 8, 15, 30, 60, 120, 240, 300)
_CANDIDATE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_GAIN_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_SUBMISSION_BUCKETS_S = (0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The miner at one moment. Validators are named by UID, endpoints by address; ages, cooldowns and
    `clock_behind` in seconds; the latter is None while too few validators have told the time.
    """

    queued: int = 0
    ages: Sequence[float] = ()
    cooldowns: Mapping[int, float] = field(default_factory=dict)
    endpoints: Mapping[str, bool] = field(default_factory=dict)
    ledger_backlog: int = 0
    clock_behind: float | None = None
    status: str = ""  # what the miner is doing, in words
    held: Sequence[tuple[int, str, float]] = ()  # UID, kind of prompt, age of each task in hand
    uid: int | None = None  # this miner's, while it is registered
    incentive: float | None = None  # its share of what all miners earn, 0..1
    hotkeys: Mapping[int, str] = field(default_factory=dict)  # of the eligible validators, which can change


class _Moment(Collector):
    """The gauges, made from the latest snapshot at each scrape, so that validators that left disappear."""

    def __init__(self) -> None:
        self.snapshot = Snapshot()

    def collect(self) -> Iterator[Metric]:
        now = self.snapshot
        yield GaugeMetricFamily("miner_queue_length", "Tasks that wait for a worker", now.queued)
        yield GaugeMetricFamily("miner_held_tasks", "Tasks pulled and not settled", len(now.ages))
        oldest, mean = max(now.ages, default=0.0), sum(now.ages) / max(len(now.ages), 1)
        yield GaugeMetricFamily("miner_held_task_oldest_seconds", "Age of the oldest held task", oldest)
        yield GaugeMetricFamily("miner_held_task_mean_seconds", "Mean age of the held tasks", mean)
        yield GaugeMetricFamily("miner_ledger_backlog_rows", "Ledger rows not written yet", now.ledger_backlog)
        if now.clock_behind is not None:
            yield GaugeMetricFamily(
                "miner_clock_behind_seconds",
                "By how much this machine's clock is behind the validators' (their median)",
                now.clock_behind,
            )
        if now.incentive is not None:
            yield GaugeMetricFamily("miner_incentive", "This miner's share of what all miners earn", now.incentive)
        cooldowns = GaugeMetricFamily(
            "miner_cooldown_seconds", "Seconds until the validator may be asked again", labels=["uid"]
        )
        for uid, seconds in now.cooldowns.items():
            cooldowns.add_metric([str(uid)], max(seconds, 0.0))
        yield cooldowns
        endpoints = GaugeMetricFamily(
            "miner_endpoint_up", "Whether the generation service can take a task", labels=["endpoint"]
        )
        for endpoint, up in now.endpoints.items():
            endpoints.add_metric([endpoint], up)
        yield endpoints


class _Disk(Collector):
    """Gauges of the spool's folder and its disk, read at each scrape."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool

    def collect(self) -> Iterator[Metric]:
        try:
            sizes = [path.stat().st_size for path in self._spool.glob("*.result")]
            free = shutil.disk_usage(self._spool).free
        except OSError:  # just removed, or not there yet: the next scrape will have it
            return
        yield GaugeMetricFamily("miner_spool_results", "Results on disk that wait for their validator", len(sizes))
        yield GaugeMetricFamily("miner_spool_bytes", "What they take", sum(sizes))
        yield GaugeMetricFamily("miner_disk_free_bytes", "Free space of the disk with spool and ledger", free)


class Metrics:
    """All metrics of one miner, in a registry of its own.

        metrics = Metrics(spool)
        metrics.serve(10007)       # a thread of its own; a port that is taken is a log line
        metrics.record(event)      # the same events that the ledger gets
        metrics.show(Snapshot(queued=2, ages=[3.1, 40.0], cooldowns={17: 120.5}, endpoints={"http://...": True}))
        metrics.close()

    Labels are bounded: outcomes and kinds are the miner's own words, UIDs those of the metagraph.
    """

    def __init__(self, spool: Path | None = None) -> None:
        """`spool`: its folder; None: no metrics of the spool and its disk."""
        self.registry = CollectorRegistry()
        self._moment = _Moment()
        self.registry.register(self._moment)
        if spool is not None:
            self.registry.register(_Disk(spool))
        self._pulls = Counter("miner_pulls", "Pulls by outcome", ["uid", "outcome"], registry=self.registry)
        self._generations = Counter(
            "miner_generations", "Attempts at a task by outcome", ["kind", "outcome"], registry=self.registry
        )
        self._submissions = Counter(
            "miner_submissions", "Submissions by outcome", ["uid", "outcome"], registry=self.registry
        )
        self._pull_s = Histogram(
            "miner_pull_seconds", "From request to answer", buckets=_PULL_BUCKETS_S, registry=self.registry
        )
        self._generation_s = Histogram(
            "miner_generation_seconds",
            "One attempt at one task",
            ["kind"],
            buckets=_GENERATION_BUCKETS_S,
            registry=self.registry,
        )
        self._submission_s = Histogram(
            "miner_submission_seconds",
            "From the first attempt to the answer",
            buckets=_SUBMISSION_BUCKETS_S,
            registry=self.registry,
        )
        self._candidates = Histogram(
            "miner_candidates", "Of how many a result was the best", buckets=_CANDIDATE_BUCKETS, registry=self.registry
        )
        self._gain = Histogram(
            "miner_candidates_gain",
            "By how much a result's score, the self-check's, is over that of its task's first candidate",
            buckets=_GAIN_BUCKETS,
            registry=self.registry,
        )
        self._unsettled: set[tuple[str, str]] = set()
        Gauge(
            "miner_submissions_unsettled",
            "Results of which it is not known yet whether they were accepted",
            registry=self.registry,
        ).set_function(lambda: len(self._unsettled))
        self._stop_serving = lambda: None

    def record(self, event: Event) -> None:
        """Counts an event."""
        uid = str(event.validator.uid)
        if isinstance(event, Pull):
            self._pulls.labels(uid, event.outcome).inc()
            self._pull_s.observe(event.seconds)
        elif isinstance(event, Generation):
            self._generations.labels(event.task.type, event.outcome).inc()
            self._generation_s.labels(event.task.type).observe(event.seconds)
            if event.outcome == "generated":
                self._candidates.observe(event.candidates)
                if event.score is not None and event.first_score is not None:
                    self._gain.observe(event.score - event.first_score)
        elif isinstance(event, Settlement):
            self._unsettled.discard((event.validator.hotkey, event.task_id))
            self._submissions.labels(uid, event.outcome).inc()
        else:
            self._submission_s.observe(event.seconds)
            if event.outcome == "unknown":
                # Counted once the validator's next answer settles it.
                self._unsettled.add((event.validator.hotkey, event.task_id))
            else:
                self._submissions.labels(uid, event.outcome).inc()

    def show(self, snapshot: Snapshot) -> None:
        """Updates the gauges."""
        self._moment.snapshot = snapshot

    def serve(self, port: int, activity: Callable[[Snapshot], bytes] | None = None) -> int | None:
        """Serves on 127.0.0.1:`port`; 0: any free port. Returns the port, or None if it is taken.

        `/activity` answers with `activity(snapshot)`, as JSON; all other paths with the metrics.
        """
        try:
            server, thread = start_http_server(port, HOST, self.registry)
        except OSError as error:
            log.error("Metrics: can not listen on %s:%d: %s; the miner goes on without", HOST, port, error.strerror)
            return None
        metrics = make_wsgi_app(self.registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if activity is None or environ.get("PATH_INFO") != ACTIVITY:
                return metrics(environ, start_response)
            content = activity(self._moment.snapshot)
            start_response("200 OK", [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
            return [content]

        server.set_app(_by_name(app))

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop_serving = stop
        log.info("Metrics on http://%s:%d/metrics", HOST, server.server_port)
        return server.server_port

    def close(self) -> None:
        """Stops serving, which takes up to half a second."""
        self._stop_serving()


def _by_name(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Refuses requests for other host names: a website can make its name resolve to this machine (DNS rebinding)."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("HTTP_HOST", "").partition(":")[0].lower() in NAMES:
            return app(environ, start_response)
        start_response("421 Misdirected Request", [("Content-Type", "text/plain")])
        return [f"only {' and '.join(NAMES)} are answered here\n".encode()]

    return guarded
