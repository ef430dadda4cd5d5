# Shared by deploy_competitive.sh, stop_competitive.sh and scripts/test.sh; sourced with the repository root as the
# working directory.
# shellcheck shell=bash

PROGRAM=$(basename "$0")
INSTALL_GB=10 # free space that a fresh install needs: 6 for the environment, the rest for pip's downloads

# How long stop_competitive.sh waits for each after SIGTERM: longer than its own time-outs of a stop add up to, which
# tests/process/test_stop_times.py checks. A keeper (keep_running.py) waits for as long as its process takes.
STOP_MINER_S=26
STOP_REHEARSAL_S=12
STOP_SERVICE_S=28

die() {
    printf '%s: %s\n' "$PROGRAM" "$*" >&2
    exit 1
}

# ---- the environment ----

# Prints a Python 3.11 or 3.12 that can make virtual environments.
find_python() {
    local candidate found=""
    for candidate in python3 python3.12 python3.11 python; do
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || continue
        found=$candidate
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    [[ -z $found ]] || die "$found lacks the venv module; on Debian and Ubuntu: apt install $found-venv"
    die "Python 3.11 or 3.12 is needed, and none of python3, python3.12, python3.11, python is one"
}

# What an installed environment depends on. The place counts too: an environment does not survive being moved.
environment_key() {
    { cat pyproject.toml constraints.txt && .venv/bin/python --version && pwd -P; } | sha256sum | cut -d ' ' -f 1
}

# ensure_environment [EXTRA...]: makes .venv with the project and these optional dependencies; quick when it is there.
ensure_environment() {
    local key="" part missing="" extras
    if .venv/bin/python -c 'import pip' 2>/dev/null; then
        key=$(environment_key)
    fi
    for part in base "$@"; do
        [[ -n $key && -f .venv/.installed-$part && $(<".venv/.installed-$part") == "$key" ]] || missing+=" $part"
    done
    [[ -n $missing ]] || return 0
    extras=$(IFS=,; printf '%s' "$*")

    if [[ -z $key ]]; then
        local python free_kb
        python=$(find_python) || exit 1
        free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
        if ((free_kb < INSTALL_GB * 1024 * 1024)); then
            die "too little disk: $((free_kb / 1024 / 1024)) GB free in $PWD, the install needs $INSTALL_GB GB"
        fi
        echo "Making the environment in .venv with $("$python" --version) ..."
        "$python" -m venv --clear .venv || die "could not make the environment in $PWD/.venv"
    fi
    echo "Installing the packages of constraints.txt (minutes, when they are not there yet) ..."
    .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}" ||
        die "pip could not install the packages: its reason is above. Running this again goes on from here."
    key=$(environment_key)
    for part in base "$@"; do
        printf '%s\n' "$key" >".venv/.installed-$part"
    done
}

has_gpu() {
    [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]
}

# Prints the optional dependencies that this machine's hardware asks for, after a look at what pip can not install.
hardware_extras() {
    has_gpu || return 0
    command -v g++ >/dev/null ||
        die "no C++ compiler: gsplat needs one for the GPU found here; on Debian and Ubuntu: apt install g++"
    local python=.venv/bin/python header
    [[ -x $python ]] || python=$(find_python) || exit 1
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
    [[ -e $header ]] || die "no $header: gsplat and torch.compile need it for the GPU found here;" \
        "on Debian and Ubuntu: apt install $(basename "$(dirname "$header")")-dev"
    echo gpu
}

# ---- processes ----

# One deploy or stop at a time. The lock is held by file descriptor 9, until it is closed.
lock_deploy() {
    mkdir -p run
    command -v flock >/dev/null || return 0
    exec 9>>run/deploy.lock
    flock -n 9 || die "a deploy or stop is at work in $PWD: wait for it, or end it with Ctrl-C where it runs"
}

module_of() {
    case $1 in
        generation_service) echo generation.serve_competitive ;;
        rehearsal) echo neurons.rehearsal ;;
        miner) echo neurons.serve_miner_competitive ;;
    esac
}

# Prints the PID of process NAME when it runs, it is the module that NAME stands for, and it was started from here.
running() {
    local pid
    pid=$(cat "run/$1.pid" 2>/dev/null) || return 1
    [[ $pid =~ ^[0-9]+$ ]] || return 1
    [[ $(readlink "/proc/$pid/cwd" 2>/dev/null) == "$(pwd -P)" ]] || return 1
    # Not grep -q: it does not read to the end, and what writes to it would fail then.
    tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -xF "$(module_of "$1")" >/dev/null || return 1
    printf '%s\n' "$pid"
}

# Whether what runs under NAME is a keeper alone, whose process crashed and is to be started again.
crashed() {
    local pid
    pid=$(running "$1") || return 1
    [[ -r /proc/$pid/task/$pid/children && -z $(<"/proc/$pid/task/$pid/children") ]]
}
