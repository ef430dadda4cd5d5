"""Checkpoints: which exist (``registry``), and where they are on this machine (``loading``)."""

from generation.weights.loading import local_folder, missing
from generation.weights.registry import Entry, MissingWeights, WeightsError, lookup

__all__ = ["Entry", "MissingWeights", "WeightsError", "local_folder", "lookup", "missing"]
