"""Home folders that can not be written, or are none: the miner and the rehearsal go on without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurons import home
from neurons.miner import options

ROOT = Path(__file__).resolve().parents[3]
# Not even root can make folders in these.
UNWRITABLE = ["/proc/nowhere", "/dev/null"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a test changes is undone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("READ_ONLY", "0")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's user without an entry in /etc/passwd."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)


@pytest.mark.parametrize("folder", UNWRITABLE)
def test_an_unwritable_home_is_said_and_left_alone(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("HOME", folder)
    assert home.prepare().startswith(f"Home folder {folder}: ")
    assert os.environ["READ_ONLY"] == "1"


def test_a_home_as_it_should_be_is_bittensor_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home.prepare() == ""
    assert os.environ["READ_ONLY"] == "0"


def test_nobody_has_no_home(no_home: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parse(["--wallet.name", "w"])
    assert "--wallet.path: this user has no home folder" in capsys.readouterr().err
    assert options.parse(["--wallet.name", "w", "--wallet.path", "/keys"]).wallet_path == Path("/keys")
    assert options.parse([]).network == "rehearsal"
    assert home.prepare()


@pytest.mark.slow
@pytest.mark.parametrize("folder", UNWRITABLE)
def test_the_miner_starts_and_says_so(tmp_path: Path, folder: str) -> None:
    """And ends for want of a key, which comes after all that."""
    log = tmp_path / "miner.log"
    command = [
        *(sys.executable, "-m", "neurons.serve_miner_competitive", "--wallet.name", "w", "--metrics-port", "0"),
        *("--wallet.path", str(tmp_path), "--logging.file", str(log)),
    ]
    environment = {**os.environ, "HOME": folder}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    first, second = log.read_text().splitlines()
    assert f"Home folder {folder}: " in first
    assert first.endswith("; the miner goes on without")
    assert "Wallet 'w', hotkey 'default': " in second


@pytest.mark.slow
def test_a_log_that_can_not_be_written_is_one_line() -> None:
    command = [sys.executable, "-m", "neurons.serve_miner_competitive", "--logging.file", "/proc/nowhere/miner.log"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr == "Log file /proc/nowhere/miner.log: No such file or directory\n"
