"""The processes that deploy_competitive.sh starts: their PID files in run/, which of them run, how they are stopped.

All paths are relative to the repository root, which is the working directory. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

ROOT = Path(__file__).resolve().parents[2]
RUN = Path("run")
MODULES = {
    "ray": "ray.scripts.scripts",
    "generation_service": "generation.serve_competitive",
    "rehearsal": "neurons.rehearsal",
    "miner": "neurons.serve_miner_competitive",
}
#: In the order in which they are stopped: what the miner still waits for and submits needs the others. In seconds, what
#: each may take after SIGTERM: longer than its own time-outs of a stop add up to (tests/process/test_stop_times.py).
#: A keeper (keep_running.py) waits for as long as its process takes.
STOP_S = {"miner": 26.0, "rehearsal": 12.0, "generation_service": 28.0, "ray": 12.0}

State = Literal["running", "crashed", "dead", "foreign", "absent"]


class Refused(Exception):
    """Why a deploy or stop can not be, in one line."""


def lock() -> IO[str]:
    """One deploy or stop at a time in this folder, until what this returns is closed. Raises Refused."""
    try:
        RUN.mkdir(exist_ok=True)
        file = (RUN / "deploy.lock").open("a")
    except OSError as error:
        raise Refused(f"can not write to {ROOT / RUN}: {error.strerror}{_owner(RUN)}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Refused(
            f"a deploy or stop is at work in {ROOT}: wait for it, or end it with Ctrl-C where it runs"
        ) from error
    except OSError as error:
        raise Refused(
            f"the filesystem of {ROOT} has no file locks ({error.strerror}), which the miner's results need too: "
            "put the folder on a local disk"
        ) from error
    return file


def _owner(path: Path) -> str:
    """Whose it is, where it is not ours."""
    try:
        owner = path.stat().st_uid
        return "" if owner == os.geteuid() else f" (it belongs to {_user(owner)})"
    except OSError:
        return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


# ---- what runs ----


def pid_file(name: str) -> Path:
    return RUN / f"{name}.pid"


def read_pid(name: str) -> str:
    """What the PID file says; it may be anything."""
    try:
        return pid_file(name).read_text(errors="replace").strip()
    except OSError:
        return ""


def state(name: str) -> State:
    """What became of the process of this name that was started here.

    crashed: its keeper waits to start it again. dead: there is a PID file alone. foreign: a process that is another
    user's, or may not be looked at, and can be the one.
    """
    if not pid_file(name).exists():
        return "absent"
    text = read_pid(name)
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        return "dead"
    process = Path("/proc", text)
    try:
        folder = os.readlink(process / "cwd")
        command = (process / "cmdline").read_bytes().split(b"\0")
    except PermissionError:
        return _foreign(process, name)
    except OSError:  # not there, or not to be seen (a /proc with hidepid)
        return "foreign" if _hidden(int(text)) else "dead"
    if folder != str(ROOT) or MODULES[name].encode() not in command:
        return "dead"
    try:
        children = (process / "task" / text / "children").read_text()
    except OSError:
        return "running"
    return "running" if children.strip() else "crashed"


def _foreign(process: Path, name: str) -> State:
    """Its command line, which anybody may read, says whether it can be ours."""
    try:
        return "foreign" if MODULES[name].encode() in (process / "cmdline").read_bytes().split(b"\0") else "dead"
    except PermissionError:
        return "foreign"
    except OSError:
        return "dead"


def _hidden(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def refuse_foreign(names: Sequence[str]) -> None:
    """Raises Refused when one of them is not ours to touch."""
    for name in names:
        if state(name) == "foreign":
            pid = read_pid(name)
            try:
                whose = f"belongs to {_user(Path('/proc', pid).stat().st_uid)}"
            except OSError:
                whose = "may not be looked at from here"
            raise Refused(
                f"{name} (PID {pid}) {whose}, and is left alone: stop it as the user who started it. "
                f"If that is no {name}: rm {pid_file(name)}"
            )


# ---- start and stop ----


def boot() -> str:
    """The same from one start of this machine, or container, to the next."""
    parts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/1/stat"):
        try:
            text = Path(path).read_text()
            # Of process 1 the time of its start: a container starts again without its machine.
            parts.append(text.rpartition(")")[2].split()[19] if path.endswith("stat") else text.strip())
        except (OSError, IndexError):
            continue
    return " ".join(parts)


def forget_before_reboot() -> bool:
    """Remove the PID files of an earlier boot; whether there were any."""
    try:
        before = (RUN / "boot").read_text()
    except OSError:
        return False
    if before == boot():
        return False
    for name in MODULES:
        pid_file(name).unlink(missing_ok=True)
    return True


def start(name: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str]) -> int:
    """With a keeper that runs it again when it crashes later; the keeper's PID.

    What a process prints beside its log (a crash of the interpreter, say) goes to run/NAME.out.
    """
    (RUN / f"{name}.up").unlink(missing_ok=True)
    (RUN / "boot").write_text(boot())
    python = ".venv/bin/python"
    keeper = [python, "scripts/ops/keep_running.py", f"run/{name}.up", str(log)]
    with (RUN / f"{name}.out").open("wb") as out:
        child = subprocess.Popen(
            [*keeper, python, "-m", MODULES[name], *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # a closed terminal does not end it
            env={**variables, "PYTHONUNBUFFERED": "1"},
        )
    try:
        pid_file(name).write_text(f"{child.pid}\n")
    except BaseException:  # a full disk, or told to end: without the file nobody would find it again
        child.kill()
        child.wait()
        raise
    return child.pid


def stop(name: str) -> str | None:
    """SIGTERM, so that work in flight is finished or spooled, and SIGKILL for what takes longer; what became of it."""
    before = state(name)
    if before == "absent":
        return None
    if before == "dead":
        pid_file(name).unlink(missing_ok=True)
        return f"{name}: was not running any more"
    pid, began = int(read_pid(name)), time.monotonic()
    _signal(pid, signal.SIGTERM)
    while state(name) in ("running", "crashed") and time.monotonic() - began < STOP_S[name]:
        time.sleep(0.1)
    if state(name) in ("running", "crashed"):
        _signal(pid, signal.SIGKILL)
        told = f"{name}: killed, it had not ended after {time.monotonic() - began:.0f} s (PID {pid})"
    else:
        told = f"{name}: stopped (PID {pid})"
    pid_file(name).unlink(missing_ok=True)
    return told


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def stop_all() -> list[str]:
    """What was stopped, a line each. Raises Refused, and stops nothing, when one of them is not ours."""
    refuse_foreign(list(MODULES))
    told = [line for line in map(stop, STOP_S) if line is not None]
    for path in (RUN / "flags", RUN / "code", RUN / "url", RUN / "boot", RUN / "miner.status", *RUN.glob("*.up")):
        path.unlink(missing_ok=True)
    return told


def main(arguments: Sequence[str]) -> int:
    """stop_competitive.sh."""
    if arguments:
        print("usage: stop_competitive.sh    stops what deploy_competitive.sh started in this folder")
        return 0 if arguments[0] in ("--help", "-h") else 2
    try:
        with lock():
            told = stop_all()
    except (Refused, OSError) as error:
        print(f"stop_competitive.sh: {error}", file=sys.stderr)
        return 1
    print("\n".join(told or ["nothing was running"]))
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
