"""FastAPI service that turns prompts into 3D Gaussian splats."""

import os
from pathlib import Path

# Before torch is imported: its OpenMP threads spin while they wait for work, which on a busy machine of few cores takes
# the time of the threads that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Transformers copies a model's own code before it runs it, by default beside the weights, which may be read-only.
os.environ.setdefault("HF_MODULES_CACHE", str(Path(__file__).resolve().parents[1] / ".cache/modules"))
