#!/usr/bin/env bash
# Stops what deploy_competitive.sh started in this folder, and nothing else. scripts/ops/processes.py goes on.
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH # the caller's would lead elsewhere
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"
python=$(bootstrap_python "$root") || exit 1
exec "$python" "$root/scripts/ops/processes.py" "$@"
