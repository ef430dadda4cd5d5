"""Dashboard and alert rules ask for metrics and labels that the two processes expose, with values that occur."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from generation.pipeline.job import Report
from generation.web.metrics import Metrics as ServiceMetrics
from neurons.miner.records.events import Generation, Pull, Submission, SubmissionOutcome
from neurons.miner.records.metrics import Metrics as MinerMetrics
from neurons.miner.records.metrics import Snapshot
from neurons.protocol import TextTask
from tests.support.ledger_events import validator

ROOT = Path(__file__).resolve().parents[3]
MONITORING = ROOT / "configs/monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/competitive-miner.json").read_text())
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
EXPRESSIONS = {
    **{f"{panel['title']} {t['refId']}": t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]},
    **{rule["alert"]: rule["expr"] for rule in RULES},
}
PROMTOOL = shutil.which("promtool")


class Engines:
    totals = {"requests": 1, "delivered": 1}  # noqa: RUF012

    def health(self) -> list[dict[str, Any]]:
        memory = {"total_bytes": 24e9, "used_bytes": 5e9, "peak_bytes": 9e9, "reserved_bytes": 12e9}
        return [
            {"device": "cuda:0", "status": "ready", "queue_depth": 0, "active": [], "ticks": {1: 3}, "memory": memory}
        ]


def samples(registry: CollectorRegistry) -> dict[str, list[dict[str, str]]]:
    """Name -> the labels of each series."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """What both processes tell after one of everything, and what Prometheus itself adds."""
    service = ServiceMetrics(Engines())
    service.record(Report(1, seconds={"dreamgaussian": 1.0}, device="cuda:0", rejected="no object"), 2.0)
    miner = MinerMetrics(tmp_path_factory.mktemp("spool"))
    task = TextTask(id="t", prompt="p")
    miner.record(Pull(validator(7), "task", 0.3, "t"))
    miner.record(Generation(validator(7), task, "generated", 18.0, 0.8, 100))
    for outcome in get_args(SubmissionOutcome):
        miner.record(Submission(validator(7), outcome, outcome, 2.5, 100))
    miner.show(Snapshot(cooldowns={7: 1.0}, endpoints={"http://a": True}, clock_behind=0.0))
    jobs = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    up = {"up": [{"job": each["job_name"]} for each in jobs]}
    return {**samples(service.registry), **samples(miner.registry), **up}


def selectors(expression: str) -> list[tuple[str, dict[str, tuple[str, str]]]]:
    """Each ``name{label="value"}``: the name, and label -> (operator, value)."""
    found = []
    for name, labels in re.findall(r"\b((?:miner|generation)_\w+|up)\b(?:\{([^}]*)\})?", expression):
        matchers = re.findall(r'(\w+)\s*(=~|=)\s*"([^"]*)"', labels)
        found.append((name, {label: (how, value) for label, how, value in matchers}))
    return found


def missing(expression: str, exposed: dict[str, list[dict[str, str]]]) -> list[str]:
    """What the expression asks for and nobody exposes."""
    problems = []
    grouped = [label for text in re.findall(r"\bby \(([^)]*)\)", expression) for label in text.split(", ")]
    series = [each for name, _ in selectors(expression) for each in exposed.get(name, [])]
    problems += [label for label in grouped if not any(label in each for each in series)]
    for name, matchers in selectors(expression):
        if name not in exposed:
            problems.append(name)
        for label, (how, value) in matchers.items():
            for wanted in value.split("|") if how == "=~" else [value]:
                if not any(each.get(label) == wanted for each in exposed.get(name, [])):
                    problems.append(f"{name}{{{label}={wanted}}}")
    return problems


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_is_asked_for_is_exposed(name: str, exposed: dict[str, list[dict[str, str]]]) -> None:
    assert selectors(EXPRESSIONS[name])
    assert missing(EXPRESSIONS[name], exposed) == []


def test_the_check_finds_what_is_not_exposed(exposed: dict[str, list[dict[str, str]]]) -> None:
    assert missing('sum by (uuid) (miner_pulls_total{outcome="tusk"}) + miner_pull', exposed) == [
        "uuid",
        "miner_pulls_total{outcome=tusk}",
        "miner_pull",
    ]


def test_legends_name_labels_that_the_result_has(exposed: dict[str, list[dict[str, str]]]) -> None:
    for panel in DASHBOARD["panels"]:
        for each in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", each["legendFormat"]):
                grouped = re.findall(r"\bby \(([^)]*)\)", each["expr"])
                series = exposed[selectors(each["expr"])[0][0]]
                assert label in (grouped[0] if grouped else series[0]), panel["title"]


def test_every_alert_says_what_to_do() -> None:
    wanted = {"NothingAccepted", "ManyDeclined", "ServiceDown", "GpuMemoryFull", "ClockOff", "DiskFull", "SpoolGrows"}
    assert wanted <= {rule["alert"] for rule in RULES}
    for rule in RULES:
        assert rule["annotations"].keys() == {"summary", "what"}
        assert rule["labels"]["severity"] in (
            "warning",
            "critical",
        )


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian: apt install prometheus)")
def test_promtool_finds_no_fault_and_the_alerts_fire() -> None:
    for command in (
        ["check", "config", "configs/monitoring/prometheus.yml"],
        ["test", "rules", "tests/support/alerts.yml"],
    ):
        ended = subprocess.run([str(PROMTOOL), *command], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
