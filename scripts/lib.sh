# Shared by deploy_competitive.sh, stop_competitive.sh and scripts/install.sh, which hand over to Python with it.
# shellcheck shell=bash

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

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

# bootstrap_python ROOT: prints the Python of its environment, or one that can make it.
bootstrap_python() {
    if "$1/.venv/bin/python" -c 'import pip' 2>/dev/null; then
        printf '%s\n' "$1/.venv/bin/python"
    else
        find_python
    fi
}
