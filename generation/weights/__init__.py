"""Checkpoints: what exists (``registry``) and where it lies on this machine (``loading``)."""

from generation.weights.loading import local_folder, missing
from generation.weights.registry import Entry, WeightsError, lookup

__all__ = ["Entry", "WeightsError", "local_folder", "lookup", "missing"]
