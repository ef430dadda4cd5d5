"""Reports and scores as HTTP headers and JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from common.log_lines import escape
from generation.schema.results import Report

MAX_REASON_CHARACTERS = 500


def report_headers(report: Report) -> dict[str, str]:
    """A report as HTTP headers: ASCII, one line each, whatever the report says."""
    headers = {
        "X-Seed": str(report.seed),
        "X-Num-Gaussians": str(report.num_gaussians),
        "X-Seconds": json.dumps({stage: round(seconds, 3) for stage, seconds in report.seconds.items()}),
    }
    if report.text_cut:
        headers["X-Text-Cut"] = json.dumps(report.text_cut)
    if report.score is not None:
        headers["X-Score"] = f"{report.score:.4f}"
        parts = {part: None if value is None else round(value, 4) for part, value in report.parts.items()}
        headers["X-Score-Parts"] = json.dumps(jsonable(parts))
    if report.candidates:
        headers["X-Scores"] = json.dumps([[seed, _rounded(score)] for seed, score in report.candidates])
    if report.hopeless:
        headers["X-Hopeless"] = "1"
    if report.rejected is not None:
        reason = escape(report.rejected)[:MAX_REASON_CHARACTERS]
        headers["X-Rejected"] = reason.encode("ascii", "backslashreplace").decode("ascii")
    return headers


def _rounded(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else round(score, 4)


def jsonable(value: Any) -> Any:
    """A value for JSON, which has no infinities, as a broken splat can measure: null instead."""
    if isinstance(value, dict):
        return {key: jsonable(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
