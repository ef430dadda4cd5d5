"""The service's metrics, as Prometheus reads them."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from generation.pipeline.job import Report
from generation.stages.self_check import GateResult
from generation.web.metrics import Metrics, rejection
from tests.support.service_harness import serving

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"generation_{name}", frozenset(labels.items())]


def test_what_the_service_did_is_counted() -> None:
    with serving() as service:
        for prompt in ("a red cube", "a blue cube", "reject", "crash"):
            service.generate(prompt)
        answer = service.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert "cube" not in answer.text
        found = samples(answer.text)
        ticks = len(service.pipeline.ticks)
    assert value(found, "admitted_requests_total") == 4
    outcomes = {"delivered": 2, "rejected": 1, "failed": 1, "cancelled": 0, "refused": 0}
    for outcome, count in outcomes.items():
        assert value(found, "requests_total", outcome=outcome) == count
    assert value(found, "rejections_total", reason="score", device="cpu") == 1
    assert value(found, "request_seconds_count", device="cpu") == 3
    assert value(found, "stage_seconds_count", stage="dreamgaussian", device="cpu") == 2
    assert value(found, "stage_seconds_sum", stage="dreamgaussian", device="cpu") == 3.0
    assert value(found, "stage_seconds_bucket", stage="text_to_image", device="cpu", le="0.1") == 0
    assert value(found, "stage_seconds_bucket", stage="text_to_image", device="cpu", le="0.25") == 2
    assert value(found, "batch_scenes_bucket", device="cpu", le="1.0") == ticks
    assert value(found, "engine_up", device="cpu") == 1
    assert value(found, "queue_depth", device="cpu") == 0
    assert value(found, "active_requests", device="cpu") == 0
    assert not any(name.startswith("generation_gpu_memory") for name, _ in found)


class TwoGpus:
    """What an engine says that has two GPUs; there is none here."""

    totals = {"requests": 5, "delivered": 5}  # noqa: RUF012

    def health(self) -> list[dict[str, Any]]:
        memory = {"total_bytes": 24e9, "used_bytes": 5e9, "peak_bytes": 9e9, "reserved_bytes": 12e9}
        active = [{"stage": "paused"}, {"stage": "dreamgaussian"}]
        first = {"device": "cuda:0", "status": "ready", "active": active, "queue_depth": 3, "memory": memory}
        second = {"device": "cuda:1", "status": "failed", "active": [], "queue_depth": 0, "memory": None}
        return [{**first, "ticks": {"1": 10, "4": 5}}, {**second, "ticks": {}}]


def test_each_gpu_has_its_own_figures() -> None:
    found = samples(Metrics(TwoGpus()).render().decode())
    for key, size in (("total", 24e9), ("used", 5e9), ("peak", 9e9), ("reserved", 12e9)):
        assert value(found, f"gpu_memory_{key}_bytes", device="cuda:0") == size
    assert ("generation_gpu_memory_used_bytes", frozenset({("device", "cuda:1")})) not in found
    assert [value(found, "engine_up", device=f"cuda:{index}") for index in (0, 1)] == [1, 0]
    assert value(found, "active_requests", device="cuda:0") == 2
    assert value(found, "paused_requests", device="cuda:0") == 1
    assert value(found, "batch_scenes_bucket", device="cuda:0", le="3.0") == 10
    assert value(found, "batch_scenes_bucket", device="cuda:0", le="4.0") == 15
    assert value(found, "batch_scenes_count", device="cuda:0") == 15
    assert value(found, "batch_scenes_sum", device="cuda:0") == 30


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (Report(1, rejected="nothing in the image"), "no_object"),
        (Report(1, score=0.2, rejected="score 0.20 is under ..."), "score"),
        (
            Report(
                1,
                gates={"finite": GateResult(True, 1, 1), "opacity": GateResult(False, 0.9, 0.8, "opacity: ...")},
                rejected="opacity: ...",
            ),
            "opacity",
        ),
    ],
)
def test_rejections_have_a_reason_in_a_word(report: Report, reason: str) -> None:
    assert rejection(report) == reason
