#!/usr/bin/env bash
# Makes .venv and installs the locked packages (scripts/install.sh --help). scripts/ops/environment.py goes on.
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH # the caller's would lead elsewhere
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"
python=$(bootstrap_python "$root") || exit 1
exec "$python" "$root/scripts/ops/environment.py" "$@"
