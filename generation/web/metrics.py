"""The service's Prometheus metrics, at ``/metrics``.

Counters and histograms of requests are updated from their reports. Ticks, memory and totals are read from the engines'
health at each scrape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

# Seconds: from a self-check on a GPU to an optimisation on two CPU cores.
_STAGE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_REQUEST_BUCKETS_S = (1, 2, 3, 4, 5, 8, 15, 30, 60, 120, 240, 480, 900, 1800)
_BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_CANDIDATE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_GAIN_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_MEMORY = {
    "used": "GPU memory that tensors take, after the latest tick",
    "peak": "The most GPU memory that tensors took so far",
    "reserved": "GPU memory held for tensors, after the latest tick",
    "total": "GPU memory of the card",
}


class _Engines(Collector):
    """Collects the current state of the engines. ``engine`` is an ``Engine`` or has its methods."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        outcomes = dict(self._engine.totals)
        admitted = outcomes.pop("requests")
        yield CounterMetricFamily("generation_admitted_requests", "Requests that got a place", admitted)
        totals = CounterMetricFamily("generation_requests", "Requests by outcome", labels=["outcome"])
        for outcome, count in outcomes.items():
            totals.add_metric([outcome], count)
        yield totals

        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"generation_{name}", text, labels=["device"])

        up, queued = gauge("engine_up", "Whether it takes requests"), gauge("queue_depth", "Requests that wait")
        active = gauge("active_requests", "Requests that run")
        paused = gauge("paused_requests", "Of these, requests that are paused for what goes before them")
        batches = HistogramMetricFamily("generation_batch_scenes", "Requests that shared a tick", labels=["device"])
        memory = {key: gauge(f"gpu_memory_{key}_bytes", text) for key, text in _MEMORY.items()}
        for entry in self._engine.health():
            device = [entry["device"]]
            up.add_metric(device, entry["status"] == "ready")
            queued.add_metric(device, entry["queue_depth"])
            active.add_metric(device, len(entry["active"]))
            paused.add_metric(device, sum(each["stage"] == "paused" for each in entry["active"]))
            ticks = {int(size): count for size, count in entry["ticks"].items()}
            buckets = [
                (str(float(limit)), sum(n for size, n in ticks.items() if size <= limit)) for limit in _BATCH_BUCKETS
            ]
            scenes = sum(size * count for size, count in ticks.items())
            batches.add_metric(device, [*buckets, ("+Inf", sum(ticks.values()))], scenes)
            for key, family in memory.items():
                if entry["memory"] is not None:
                    family.add_metric(device, entry["memory"][f"{key}_bytes"])
        yield from (up, queued, active, paused, batches, *memory.values())


class Metrics:
    """All metrics of one service, in a registry of its own.

    Labels are bounded: stages, gates, outcomes and devices are the service's own words.
    """

    def __init__(self, engine: Any) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(engine))
        self._stage_s = Histogram(
            "generation_stage_seconds",
            "One request in one stage",
            ["stage", "device"],
            buckets=_STAGE_BUCKETS_S,
            registry=self.registry,
        )
        self._request_s = Histogram(
            "generation_request_seconds",
            "From a request's arrival to its splat or its rejection",
            ["device"],
            buckets=_REQUEST_BUCKETS_S,
            registry=self.registry,
        )
        self._rejections = Counter(
            "generation_rejections",
            "Rejected results by the gate that failed, score or no_object",
            ["reason", "device"],
            registry=self.registry,
        )

        self._candidates = Histogram(
            "generation_candidates",
            "Candidates that came to a result, of requests for several",
            buckets=_CANDIDATE_BUCKETS,
            registry=self.registry,
        )
        self._gain = Histogram(
            "generation_candidates_gain",
            "By how much the best candidate's score is over that of the request's own seed",
            buckets=_GAIN_BUCKETS,
            registry=self.registry,
        )

    def record(self, report: Any, seconds: float) -> None:
        """Count a request with a result. ``seconds``: from its arrival to the result."""
        self._request_s.labels(report.device).observe(seconds)
        for stage, spent in report.seconds.items():
            self._stage_s.labels(stage, report.device).observe(spent)
        if report.rejected is not None:
            self._rejections.labels(rejection(report), report.device).inc()

        if report.candidates:
            self._candidates.observe(len(report.candidates))
            first = report.candidates[0][1]
            if first is not None and report.score is not None:
                self._gain.observe(report.score - first)

    def render(self) -> bytes:
        return generate_latest(self.registry)


def rejection(report: Any) -> str:
    """The label of a rejection: an empty image, a gate's name, or the score."""
    if report.score is not None:
        return "score"
    return next((name for name, gate in report.gates.items() if not gate.passed), "no_object")
