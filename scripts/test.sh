#!/usr/bin/env bash
# Everything that is tested, in one command: makes the environment when it is missing, checks style, imports and types,
# runs pytest, then the ten checks against a running service (or one of its own).
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH # the caller's would lead elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install.sh --dev
[[ $(nvidia-smi -L 2>/dev/null) != *GPU* ]] || .venv/bin/python -m scripts.ops.build_gsplat

.venv/bin/ruff check .
.venv/bin/lint-imports
.venv/bin/mypy
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n 2 --dist loadfile
.venv/bin/python -m pytest -m slow
.venv/bin/python test_competitive.py
