"""Scores a splat the way the subnet's validators do, before it leaves the machine: hard gates, then the final score.

Views of it are held against the prompt (``alignment``), judged by a learned image quality (``quality``) and compared
with each other (``similarity``); ``generation.schema.score`` makes one figure of all. Parts whose weights are not on
this machine are left out, not estimated.
"""

from generation.schema.results import GateResult
from generation.stages.self_check.alignment import ImageClip, TextClip
from generation.stages.self_check.check import Check, SelfCheck
from generation.stages.self_check.gates import run_gates
from generation.stages.self_check.outliers import drop_outliers
from generation.stages.self_check.quality import Quality, QualityNet
from generation.stages.self_check.similarity import Lpips, neighbour_ssim
from generation.stages.self_check.views import (
    ELEVATION,
    FOVY,
    RADIUS,
    VIEW_SIZE,
    VIEWS,
    fit_to_frame,
    grid_preview,
    preview,
    render_views,
    to_tensor,
    to_validators_frame,
)

__all__ = [
    "ELEVATION",
    "FOVY",
    "RADIUS",
    "VIEWS",
    "VIEW_SIZE",
    "Check",
    "GateResult",
    "ImageClip",
    "Lpips",
    "Quality",
    "QualityNet",
    "SelfCheck",
    "TextClip",
    "drop_outliers",
    "fit_to_frame",
    "grid_preview",
    "neighbour_ssim",
    "preview",
    "render_views",
    "run_gates",
    "to_tensor",
    "to_validators_frame",
]
