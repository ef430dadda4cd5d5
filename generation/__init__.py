"""FastAPI service that turns prompts into 3D Gaussian splats."""

import os
from pathlib import Path

_CACHE = Path(__file__).resolve().parents[1] / ".cache"

# Before torch is imported: its OpenMP threads spin while they wait for work, which on a busy machine of few cores takes
# the time of the threads that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Transformers copies a model's own code before it runs it, by default beside the weights, which may be read-only.
os.environ.setdefault("HF_MODULES_CACHE", str(_CACHE / "modules"))
# What is compiled for a GPU is kept between starts. Before torch is imported, too: its compiler settles for a folder in
# /tmp at once, which a rented machine's restart may empty.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE / "compiled"))
os.environ.setdefault("TRITON_CACHE_DIR", str(_CACHE / "compiled" / "triton"))
