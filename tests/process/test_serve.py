"""The entry point as a process, and its log."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.log_lines import SingleLineFormatter
from generation.engine.engine import Engine
from generation.fleet.fleet import Fleet
from generation.logging_setup import setup_logging
from generation.serve_competitive import listen, main, make_engine
from generation.settings import Settings
from tests.support.service_harness import PATIENCE_S, wait_until

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "generation.serve_competitive", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_wrong_arguments_are_named_with_their_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--port", "99999", "--validation-threshold", "x\ny"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("serve_competitive: --port 99999: ")
    assert "65535" in lines[0]
    assert lines[1].startswith("serve_competitive: --validation-threshold x\\ny: ")


def test_a_busy_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("--port", str(port), "--log-file", str(tmp_path / "log"))
    assert result.returncode == 1
    assert f"Can not listen on 127.0.0.1 port {port}: " in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 70])
def test_a_host_that_is_none_is_one_line(tmp_path: Path, host: str) -> None:
    result = run("--host", host, "--log-file", str(tmp_path / "log"))
    assert result.returncode == 1
    assert f"Can not listen on {host} port 10006: " in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_cluster_without_a_token_is_one_line(tmp_path: Path) -> None:
    token = tmp_path / "token"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cluster = ("--cluster", "127.0.0.1:1", "--cluster-token-file", str(token))
    result = run(*cluster, "--port", str(port), "--log-file", str(tmp_path / "log"))
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"cluster_token_file: {token}: no token of the cluster can be read: No such file or directory")


def test_help_tells_the_defaults() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "10006" in result.stdout
    assert "127.0.0.1" in result.stdout


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_the_socket_listens_at_once(host: str) -> None:
    try:
        listener = listen(host, 0)
    except OSError:
        pytest.skip(f"{host} is not on this machine")
    with listener, socket.create_connection((host, listener.getsockname()[1]), timeout=5):
        pass


@pytest.mark.parametrize("gpus", [(0,), (1, 0)])
def test_each_gpu_gets_an_engine_in_a_process_of_its_own(gpus: tuple[int, ...], tmp_path: Path) -> None:
    settings = Settings.resolve({"profile": "tiny", "profile_trace": tmp_path / "trace"})
    fleet = make_engine(settings.model_copy(update={"gpus": gpus}))
    assert isinstance(fleet, Fleet)
    assert [(each["device"], each["status"]) for each in fleet.health()] == [(f"cuda:{n}", "loading") for n in gpus]


def test_on_the_cpu_the_engine_is_in_the_service_itself() -> None:
    settings = Settings.resolve({"profile": "tiny"})
    assert isinstance(make_engine(settings.model_copy(update={"gpus": ()})), Engine)


def record(message: str, *arguments: object, exc_info: object = None) -> logging.LogRecord:
    return logging.LogRecord("generation.x", logging.INFO, "x.py", 1, message, arguments, exc_info)  # type: ignore[arg-type]


def test_a_message_stays_one_line_whatever_it_holds() -> None:
    line = SingleLineFormatter().format(record("prompt %s", "a\n2026-01-01 ERROR forged\r\x1b[31m\u2028\u202e\x85"))
    assert len(line.splitlines()) == 1
    assert "a\\n2026-01-01 ERROR forged\\r\\x1b[31m\\u2028\\u202e\\x85" in line
    assert "é日本" in SingleLineFormatter().format(record("é日本"))


def test_a_traceback_can_not_pass_for_an_entry() -> None:
    try:
        raise ValueError("x\n2026-01-01 00:00:00,000 ERROR forged")
    except ValueError:
        text = SingleLineFormatter().format(record("failed", exc_info=sys.exc_info()))
    first, *rest = text.splitlines()
    assert first.endswith("generation.x: failed")
    assert rest
    assert all(line.startswith("    | ") for line in rest)


def test_the_log_rotates_and_keeps_five(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr("generation.logging_setup.MAX_BYTES", 500)
    path = tmp_path / "deeper" / "service.log"
    try:
        root.handlers = []
        setup_logging(path)
        for i in range(100):
            logging.getLogger("generation").info("line %d", i)
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers, root.level = before, level
        logging.captureWarnings(False)
    assert "line 99" in path.read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ["service.log", *(f"service.log.{i}" for i in range(1, 6))]


@pytest.mark.slow
def test_it_stops_in_good_order_on_sigterm(tmp_path: Path) -> None:
    """Even while it still loads, or failed to: with models that are not there, /health tells so until it is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = tmp_path / "models.yaml"
    names = ("text_to_image", "background", "mvdream", "lgm", "clip")
    sizes = {"text_to_image": ", image_size: 64", "background": ", image_size: 64"}
    models.write_text("".join(f"{name}: {{model: ./nowhere{sizes.get(name, '')}}}\n" for name in names))
    log = tmp_path / "log"
    arguments = ["--port", str(port), "--models", str(models), "--log-file", str(log)]
    command = [sys.executable, "-m", "generation.serve_competitive", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}/health"
            wait_until(lambda: health(url).get("status") == "failed")
            assert health(url)["reason"].startswith("loading failed: ")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
    assert log.read_text().splitlines()[-1].endswith("Stopped")


def health(url: str) -> dict[str, Any]:
    """Empty while nobody answers."""
    try:
        return dict(httpx.get(url, timeout=PATIENCE_S).json())
    except httpx.TransportError:
        return {}


def test_the_file_s_own_table_is_checked_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "competitive.toml"
    file.write_text('[service]\nport = 0\nlog_file = "log"\n[miner]\nworkers = "the miner\'s business"\n')
    with pytest.raises(SystemExit) as stop:
        main(["--config-file", str(file)])
    assert stop.value.code == 2
    assert f"{file}: [service] port = 0: must be a whole number in 1..65535" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_settings_that_can_not_be_saved_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-file", "/proc/nowhere/competitive.toml", "--save", "--port", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "serve_competitive: --config-file /proc/nowhere/competitive.toml: No such file or directory"
