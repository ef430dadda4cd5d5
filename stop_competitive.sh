#!/usr/bin/env bash
# Stops what deploy_competitive.sh started in this folder, and nothing else: SIGTERM first, so that work in flight is
# finished or spooled, and SIGKILL for whatever takes longer than that may take (scripts/lib.sh has the seconds).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

if (($# > 0)); then
    echo "usage: $PROGRAM    stops the miner, the rehearsal network and the generation service of this folder"
    [[ $1 == --help || $1 == -h ]] && exit 0 || exit 2
fi

stop() { # NAME SECONDS: what it may take
    local name=$1 seconds=$2 pid
    if ! pid=$(running "$name"); then
        [[ ! -e run/$name.pid ]] || echo "$name: was not running any more"
        rm -f "run/$name.pid"
        return
    fi
    SECONDS=0
    kill -TERM "$pid" 2>/dev/null || true
    while running "$name" >/dev/null && ((SECONDS < seconds)); do
        sleep 0.1
    done
    if running "$name" >/dev/null; then
        kill -KILL "$pid" 2>/dev/null || true
        echo "$name: killed, it had not ended after $SECONDS s (PID $pid)"
    else
        echo "$name: stopped (PID $pid)"
    fi
    rm -f "run/$name.pid"
}

lock_deploy
shopt -s nullglob
found=(run/*.pid)
# The miner first: what it still waits for and submits needs the others.
stop miner "$STOP_MINER_S"
stop rehearsal "$STOP_REHEARSAL_S"
stop generation_service "$STOP_SERVICE_S"
rm -f run/flags run/url run/miner.status run/*.up
((${#found[@]} > 0)) || echo "nothing was running"
