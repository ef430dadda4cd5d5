"""FastAPI service that turns prompts into 3D Gaussian splats."""

import os

# Before torch is imported: its OpenMP threads spin while they wait for work, which on a busy machine of few cores takes
# the time of the threads that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
