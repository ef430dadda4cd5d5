"""scripts.ops.processes: whose processes are touched, and what a filesystem without locks is told."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.ops import deploy, processes

NOBODY = 65534


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The PID of what looks like a miner that was started in this folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    Path("run").mkdir()
    wait = "import subprocess; subprocess.run(['sleep', '100'])"  # a keeper and its process
    with subprocess.Popen([sys.executable, "-c", wait, processes.MODULES["miner"]], cwd=tmp_path) as keeper:
        Path("run/miner.pid").write_text(f"{keeper.pid}\n")
        children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
        while not children.read_text().strip():
            time.sleep(0.01)
        yield keeper.pid
        child = int(children.read_text() or 0)
        keeper.kill()
        if child:
            os.kill(child, 9)


def hide(monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
    """As another user's: its folder may not be looked at."""

    def readlink(path: object, **_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "readlink", readlink)


def test_ours_is_ours(running: int) -> None:
    assert processes.state("miner") == "running"
    assert processes.state("rehearsal") == "absent"


def test_another_clones_miner_that_has_the_number_now_is_not_ours(
    running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ROOT", Path("/another/clone"))
    assert processes.state("miner") == "dead"


def test_another_users_deployment_is_left_alone_and_its_pid_file_kept(
    running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, running)
    with pytest.raises(processes.Refused, match=rf"miner \(PID {running}\) belongs to \w+, and is left alone"):
        processes.stop_all()
    assert Path("run/miner.pid").read_text() == f"{running}\n"
    assert Path(f"/proc/{running}").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
def test_it_is_the_kernel_that_says_so(running: int) -> None:
    for folder in (Path(), Path("run")):
        folder.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        assert processes.state("miner") == "foreign"
    finally:
        os.seteuid(0)
    assert processes.state("miner") == "running"


def test_a_process_that_is_not_to_be_seen_may_be_one(running: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid the kernel shows no folder of it, and only a signal tells that it is there."""

    def kill(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def readlink(path: object, **_: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No such file", str(path))

    with monkeypatch.context() as hidden:
        hidden.setattr(os, "kill", kill)
        hidden.setattr(os, "readlink", readlink)
        with pytest.raises(processes.Refused, match=r"rm run/miner\.pid"):
            processes.stop_all()
    assert Path("run/miner.pid").exists()


def test_another_users_process_that_is_no_miner_has_only_the_number(
    running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run/miner.pid").write_text("1\n")  # its command line is no miner's
    hide(monkeypatch, 1)
    assert processes.state("miner") == "dead"
    assert processes.stop_all() == ["miner: was not running any more"]
    assert not Path("run/miner.pid").exists()


def test_a_filesystem_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(processes.Refused, match=r"has no file locks \(No locks available\).*local disk"):
        processes.lock()


def test_one_deploy_or_stop_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with processes.lock(), pytest.raises(processes.Refused, match="a deploy or stop is at work"):
        processes.lock()
    processes.lock().close()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which a process can be started, with a keeper that does nothing."""
    monkeypatch.chdir(tmp_path)
    for folder in ("run", ".venv/bin", "scripts/ops"):
        Path(folder).mkdir(parents=True)
    Path(".venv/bin/python").symlink_to(sys.executable)
    Path("scripts/ops/keep_running.py").write_text("import time; time.sleep(1000)")


@pytest.mark.usefixtures("clone")
def test_a_closed_terminal_ends_nothing() -> None:
    pid = processes.start("miner", [], Path("log"), os.environ)
    try:
        assert os.getsid(pid) == pid != os.getsid(0)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("name", ["neurons/new.py", "configs/lgm.yaml", "generation/web/studio/page.html"])
def test_what_runs_notices_that_its_code_or_configs_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(deploy, "ROOT", tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    before = deploy._code()
    path.write_text("one")
    between = deploy._code()
    path.write_text("two")
    assert len({before, between, deploy._code()}) == 3


@pytest.mark.usefixtures("clone")
def test_what_no_pid_file_names_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run/miner.pid").symlink_to("/dev/full")
    started = []

    def note(*arguments: Any, **settings: Any) -> Any:
        started.append(subprocess_popen(*arguments, **settings))
        return started[-1]

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", note)
    try:
        with pytest.raises(OSError, match="No space left"):
            processes.start("miner", [], Path("log"), os.environ)
        (child,) = started
        assert child.poll() is not None
    finally:
        for child in started:
            child.kill()
            child.wait()


def test_pid_files_are_forgotten_only_after_a_restart(running: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not processes.forget_before_reboot()  # nothing says when they were written
    Path("run/boot").write_text(processes.boot())
    assert not processes.forget_before_reboot()
    assert Path("run/miner.pid").exists()
    monkeypatch.setattr(processes, "boot", lambda: "another")
    assert processes.forget_before_reboot()
    assert not Path("run/miner.pid").exists()
