#!/usr/bin/env bash
# Everything that is tested, in one command: makes the environment when it is missing, checks style, imports and types,
# runs pytest, then the ten checks against a running service (or one of its own).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

extras=$(hardware_extras)
# shellcheck disable=SC2086  # one word for each extra
ensure_environment dev $extras
[[ -z $extras ]] || .venv/bin/python -m scripts.ops.build_gsplat

.venv/bin/ruff check .
.venv/bin/lint-imports
.venv/bin/mypy
.venv/bin/python -m pytest -m "not slow"
.venv/bin/python -m pytest -m slow
.venv/bin/python test_competitive.py
