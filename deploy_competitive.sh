#!/usr/bin/env bash
# From a fresh machine to a running miner: ./deploy_competitive.sh --help. Finds a Python; scripts/ops/deploy.py goes on.
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH # the caller's would lead elsewhere
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source=scripts/lib.sh
source "$root/scripts/lib.sh"
python=$(bootstrap_python "$root") || exit 1
exec "$python" "$root/scripts/ops/deploy.py" "$@"
