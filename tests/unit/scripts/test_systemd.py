"""The systemd units, by systemd's own check, and whom they are written for."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import aiohttp
import pytest

from scripts.ops import deploy, environment, probe, serve, systemd
from scripts.ops.processes import MODULES, Refused

NAMES = ("ray", "generation_service", "rehearsal", "miner")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What systemctl is asked."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(systemd, "_systemctl", lambda *arguments, may_fail=False: asked.append(arguments))
    return asked


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian: apt install systemd)"
)
def test_systemd_finds_no_fault_in_them(tmp_path: Path) -> None:
    root = tmp_path / "a clone"
    (root / ".venv/bin").mkdir(parents=True)
    (root / ".venv/bin/python").symlink_to(sys.executable)
    for name, content in systemd.render(NAMES, root, getpass.getuser()).items():
        (tmp_path / name).write_text(content)
    units = sorted([*tmp_path.glob("*.service"), *tmp_path.glob("*.target")])
    assert len(units) == 5
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    (tmp_path / "competitive-miner.service").write_text("[Service]\nExecStart=/nowhere/python\nRestrat=always\n")
    planted = subprocess.run(["systemd-analyze", "verify", tmp_path / "competitive-miner.service"], capture_output=True)
    assert planted.returncode != 0


def test_install_and_uninstall(tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    systemd.install(NAMES, "somebody", tmp_path)
    assert "User=somebody\n" in (tmp_path / "competitive-miner.service").read_text()
    assert calls[-1][:2] == ("enable", "--now")
    assert "competitive.target" in calls[-1]
    systemd.install(("generation_service", "miner"), "somebody", tmp_path)  # from now on for real
    assert not (tmp_path / "competitive-rehearsal.service").exists()
    assert "rehearsal" not in (tmp_path / "competitive-miner.service").read_text()
    assert len(systemd.uninstall(tmp_path)) == 3
    assert not list(tmp_path.iterdir())
    assert systemd.uninstall(tmp_path) == ["no service was installed"]


def test_another_folders_units_stay(tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "competitive.target").write_text(f"[Unit]\nDescription=Competitive miner in {other}\n")
    with pytest.raises(Refused, match=f"is of {other}"):
        systemd.install(NAMES, "somebody", tmp_path)
    with pytest.raises(Refused, match=f"is of {other}"):
        systemd.uninstall(tmp_path)
    assert calls == []
    other.rmdir()  # it was moved: nobody else could take them away
    assert len(systemd.uninstall(tmp_path)) == 1


def test_without_systemd_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(Refused, match=r"no systemd here.*\n.*deploy_competitive\.sh, and then: sleep infinity\n.*cron"):
        systemd.check_can_install()


def test_what_systemd_starts_is_what_deploy_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the settings' file alone, which the flags were saved into."""
    monkeypatch.setattr(deploy, "ROOT", tmp_path)
    (tmp_path / "competitive.toml").write_text(
        '[wallet]\nname = "cold"\n[service]\nport = 12345\n[miner]\nendpoints = ["http://far:1"]\n'
    )
    monkeypatch.setattr(probe, "health_of", lambda url: {"status": "ready", "engines": [{"at_once": 5}]})
    python = str(environment.PYTHON)
    deployment = deploy.Deployment(deploy.parse([], tmp_path))
    service = serve.command(deployment, "generation_service")
    assert service[:3] == [python, "-m", MODULES["generation_service"]]
    assert service[3:5] == ["--port", "12345"]
    assert service[-2:] == ["--profile", "full"]
    miner = serve.command(deployment, "miner")
    assert miner[:3] == [python, "-m", MODULES["miner"]]
    assert miner[miner.index("--workers") + 1] == "10"  # five places here and five far away
    variables = deployment.variables("miner")
    assert variables["COMPETITIVE_NETWORK_NAME"] == "finney"
    assert variables["COMPETITIVE_MINER_ENDPOINTS"] == "http://127.0.0.1:12345 http://far:1"
    assert variables.items() >= os.environ.items()


def test_units_are_refused_what_they_will_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By variables it would decide for the network that is mined on, and the units would rehearse."""
    monkeypatch.setenv("COMPETITIVE_WALLET_NAME", "cold")
    with pytest.raises(Refused, match="COMPETITIVE_WALLET_NAME"):
        deploy.deploy(deploy.parse(["--install-service"], tmp_path), tmp_path)


def test_a_service_behind_a_password_tells_its_places() -> None:
    """By the user and password of its address, as the miner asks it."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"engines": [{"at_once": 9}]}).encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert probe.workers_for([f"http://miner:se%3Acret@127.0.0.1:{server.server_port}/"]) == 9
        server.shutdown()
    assert seen == [aiohttp.encode_basic_auth("miner", "se:cret")]


def test_a_service_that_does_not_tell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.workers_for(["http://miner:secret@nowhere.invalid:10006/"]) == probe.WORKERS
    told = capsys.readouterr().out
    assert "nowhere.invalid:10006" in told
    assert "secret" not in told


def test_health_checks_of_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "miner.status"
    assert probe.main("miner", str(status)) == 1
    status.write_text("{}")
    assert probe.main("miner", str(status)) == 0
    os.utime(status, (1, 1))  # a miner that hangs writes nothing any more
    assert probe.main("miner", str(status)) == 1
    monkeypatch.setattr(probe, "health_of", lambda url: {"status": "loading"})
    assert probe.main("service", "http://127.0.0.1:1") == 1
    monkeypatch.setattr(probe, "health_of", lambda url: {"status": "ready"})
    assert probe.main("service", "http://127.0.0.1:1") == 0
