"""Environment variables of every process of a Ray cluster: the token that admits it, and Ray's settings.

Standard library alone: ``deploy_competitive.sh`` needs it before anything is installed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Whoever reaches Ray's ports and knows the token can run code there, so it is as long as a key.
LEAST_CHARACTERS, MOST_BYTES = 32, 4096
#: Ray resource by which a machine without GPUs declares its number of engines; with GPUs, these count.
ENGINE = "engine"

_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # not Ray's default
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    # The memory monitor is off: it would kill an engine with models in pinned memory when main memory is nearly full.
    "RAY_memory_monitor_refresh_ms": "0",
    # A machine that does not answer the head for 10 s is gone; Ray's defaults take 15 to 60.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    # Seconds after which a machine without its head ends; its keeper then joins the next head.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    # No draining: the fleet reruns a leaving machine's requests elsewhere anyway.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_prestart_worker_first_driver": "0",  # no processes that no engine would use
}


def check_token_file(path: Path) -> None:
    """Raises ValueError if the file is not fit to hold a token: one line, which does not quote it."""

    def refuse(why: str) -> ValueError:
        return ValueError(f"cluster_token_file: {path}: {why}")

    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise refuse(f"no token of the cluster can be read: {error.strerror}") from None
    try:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise refuse("must be a plain file")
        if about.st_uid != os.geteuid():
            raise refuse("must belong to the user who starts this")
        if about.st_mode & 0o077:
            raise refuse(f"others can read or write it (mode {stat.S_IMODE(about.st_mode):04o}): chmod 600 {path}")
        token = os.read(file, MOST_BYTES + 1).strip()
    finally:
        os.close(file)
    if not LEAST_CHARACTERS <= len(token) <= MOST_BYTES or not re.fullmatch(rb"[!-~]+", token):
        raise refuse(f"must hold one line of {LEAST_CHARACTERS} to {MOST_BYTES} printable characters without spaces")


def environment(token_file: Path, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for ``ray start``, and for a process before it imports ray: ``given`` (this process's) with ours.

    A token in the variable RAY_AUTH_TOKEN, as KubeRay gives it, counts where the file does not exist. Raises ValueError
    as ``check_token_file`` does.
    """
    try:
        token_file = token_file.expanduser()
    except RuntimeError:
        raise ValueError(f"cluster_token_file: {token_file}: there is no home folder") from None
    variables = {**(os.environ if given is None else given), **_SETTINGS}
    token = variables.get("RAY_AUTH_TOKEN")
    if not token or token_file.exists():
        check_token_file(token_file)
        variables.pop("RAY_AUTH_TOKEN", None)  # Ray would prefer it to the file
        variables["RAY_AUTH_TOKEN_PATH"] = str(token_file.absolute())
    elif len(token) < LEAST_CHARACTERS:
        raise ValueError(f"RAY_AUTH_TOKEN: must have at least {LEAST_CHARACTERS} characters")
    # Ray starts engines elsewhere, and they import this code.
    others = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *others])
    return variables
