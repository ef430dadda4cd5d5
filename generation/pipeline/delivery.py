"""What becomes of a checked splat: a PLY, or a rejection with its reason."""

from __future__ import annotations

import math

import torch

from generation.pipeline.job import Job
from generation.schema.results import Asset
from generation.schema.score import in_words
from generation.splats import ply
from generation.splats.gaussians import Gaussians
from generation.stages.self_check import Check, fit_to_frame


def deliver(job: Job, check: Check) -> None:
    """Finish a job whose splat was checked: with its PLY, fitted to the validators' frame, or with a rejection."""
    request, report, gaussians = job.request, job.report, job.gaussians
    assert gaussians is not None
    report.num_gaussians = len(gaussians)
    report.gates = check.gates
    if check.score is None:
        _reject(job, check.failed_gate or "not scored")
        return
    report.score, report.parts = min(1.0, check.score), check.parts  # capped as in a validator's feedback
    job.gaussians = fit_to_frame(gaussians)
    if report.score < request.threshold:
        shown = math.floor(report.score * 100) / 100  # rounded down: it must not look like the threshold
        why = f" is under the threshold {request.threshold:.2f}"
        if check.is_misaligned:  # the parts alone would not explain a score of 0
            why = f": an alignment under {check.least_alignment:.2f} makes it 0"
        _reject(job, f"score {in_words(shown, check.parts)}{why}")
        return
    job.outcome = Asset(ply.write(job.gaussians), report, job.gaussians)


def _reject(job: Job, reason: str) -> None:
    """Reject a job. A watched one gets its PLY all the same, if its values are finite."""
    job.reject(reason)
    gaussians = job.gaussians
    if job.request.watched and gaussians is not None and len(gaussians) and _is_finite(gaussians):
        job.outcome = Asset(ply.write(gaussians), job.report, gaussians)


def _is_finite(gaussians: Gaussians) -> bool:
    return all(bool(torch.isfinite(values).all()) for values in vars(gaussians).values())
