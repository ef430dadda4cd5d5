"""scripts.ops.cluster: which networks a cluster's token may travel over, and what Ray is started with."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from generation.fleet import ray_environment
from scripts.ops import cluster, deploy
from scripts.ops.processes import Refused


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Its /sys/class/net. It has a public, a private and a WireGuard address."""
    addresses = {"lo": "127.0.0.1", "eth0": "203.0.113.5", "eth1": "192.168.7.5", "wg0": "100.90.0.5"}
    monkeypatch.setattr(cluster, "_interfaces", lambda: addresses)
    monkeypatch.setattr(cluster, "NET", tmp_path)
    for name in addresses:
        (tmp_path / name).mkdir()
        # As the kernel writes it: drivers/net/wireguard/device.c names its device type.
        kind = "DEVTYPE=wireguard\n" if name == "wg0" else ""
        (tmp_path / name / "uevent").write_text(f"{kind}INTERFACE={name}\n")
    return tmp_path


@pytest.mark.parametrize("address", ["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.0.1", "192.168.7.5"])
def test_a_private_range_is_taken_with_a_warning(machine: Path, address: str) -> None:
    assert "a private range: token and data travel in clear" in cluster.check_network(address, None, {})


@pytest.mark.parametrize("address", ["9.255.255.255", "11.0.0.1", "172.15.0.1", "172.32.0.1", "192.167.1.1",
                                     "203.0.113.5", "100.64.0.1", "169.254.1.1", "0.0.0.0"])  # fmt: skip
def test_any_other_is_refused_with_what_to_set(machine: Path, address: str) -> None:
    for own, other in ((address, None), ("10.0.0.1", address)):
        with pytest.raises(Refused, match=f"^{re.escape(address)} is a public address.*WireGuard.*RAY_USE_TLS=1") as no:
            cluster.check_network(own, other, {})
        assert "\n" not in str(no.value)


def test_wireguard_may_have_any_address(machine: Path) -> None:
    assert "100.90.0.5 on wg0, WireGuard: encrypted" in cluster.check_network("100.90.0.5", "100.90.0.1", {})
    (machine / "wg0/uevent").write_text("INTERFACE=wg0\n")  # a name alone is nothing
    with pytest.raises(Refused):
        cluster.check_network("100.90.0.5", "100.90.0.1", {})


def test_tls_needs_its_files(machine: Path) -> None:
    variables = {"RAY_USE_TLS": "1"}
    for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
        with pytest.raises(Refused, match=f"{name} names no file"):
            cluster.check_network("203.0.113.5", None, variables)
        (machine / name).touch()
        variables[name] = str(machine / name)
    assert "with TLS: encrypted" in cluster.check_network("203.0.113.5", None, variables)


def test_where_there_is_no_default_route_the_only_address_is_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object, **__: object) -> list[object]:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.getaddrinfo", nowhere)
    monkeypatch.setattr(cluster, "_interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.1"})
    assert cluster.own_address(None) == "10.0.0.1"
    monkeypatch.setattr(cluster, "_interfaces", lambda: {"eth0": "10.0.0.1", "eth1": "10.1.0.1"})
    with pytest.raises(Refused, match=r"10\.0\.0\.1, 10\.1\.0\.1.*Name it: --cluster ADDRESS:6379"):
        cluster.own_address(None)


def test_interfaces_of_this_machine() -> None:
    assert cluster._interfaces()["lo"] == "127.0.0.1"


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    token = tmp_path / "deeper" / "token"
    assert cluster.make_token(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    ray_environment.check_token_file(token)
    before = token.read_text()
    assert not cluster.make_token(token)
    assert token.read_text() == before
    token.unlink()
    token.symlink_to(tmp_path / "elsewhere")
    assert not cluster.make_token(token)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("is_head", [True, False])
def test_ray_takes_what_it_is_started_with(is_head: bool) -> None:
    """By Ray's own parser."""
    from ray.scripts.scripts import start as ray_start  # not at the top: Ray reads its token when it is imported

    program, *words = cluster.ray_arguments(("10.0.0.1", 6379), "10.0.0.2", is_head, 1)
    assert program == "start"
    given = ray_start.make_context("start", words).params
    assert given["block"]
    assert given["head"] is is_head
    assert (given["port"], given["address"]) == ((6379, None) if is_head else (None, "10.0.0.1:6379"))
    assert given["node_ip_address"] == "10.0.0.2"
    assert given["resources"] == '{"engine": 1}'
    assert given["include_dashboard"] is (False if is_head else None)
    ports = {given[flag.strip("-").replace("-", "_")] for flag in cluster.PORTS}
    assert ports == set(cluster.PORTS.values())
    assert given["ray_client_server_port"] is None


def test_too_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": 64 << 20}))
    with pytest.raises(Refused, match=r"/dev/shm has 64 MiB, and Ray needs 512.*--shm-size"):
        cluster.check_shared_memory()


def deployment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> deploy.Deployment:
    monkeypatch.setattr(deploy, "ROOT", tmp_path)
    return deploy.Deployment(deploy.parse(words, tmp_path))


def test_what_runs_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deploy.environment, "has_gpu", lambda: False)
    head = deployment(monkeypatch, tmp_path, "--cluster-head", "--cluster", "10.0.0.1:7000", "--profile", "tiny")
    assert head.names == ("ray", "generation_service", "rehearsal", "miner")
    assert "--port=7000" in head.arguments("ray")
    assert not any("resources" in word for word in head.arguments("ray"))
    service = head.arguments("generation_service")
    assert service[service.index("--cluster") + 1] == "10.0.0.1:7000"
    joined = deployment(monkeypatch, tmp_path, "--join", "127.0.0.1:6379", "--profile", "tiny")
    assert joined.names == ("ray",)
    assert "--address=127.0.0.1:6379" in joined.arguments("ray")
    assert '--resources={"engine": 1}' in joined.arguments("ray")
    monkeypatch.setattr(deploy.environment, "has_gpu", lambda: True)  # which Ray counts itself
    assert not any("resources" in word for word in joined.arguments("ray"))
    assert deployment(monkeypatch, tmp_path).names == ("generation_service", "rehearsal", "miner")
    assert joined.flags() != head.flags()
    others = deployment(monkeypatch, tmp_path, "--cluster", "10.0.0.1:6379")  # a Ray that is there already
    assert others.names == ("generation_service", "rehearsal", "miner")
    assert others.needs_ray
    assert others.places() == 64


def test_the_file_of_settings_says_it_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "competitive.toml").write_text('[cluster]\nhead = true\n[service]\ncluster = "10.0.0.1:6379"\n')
    assert "ray" in deployment(monkeypatch, tmp_path).names
    (tmp_path / "competitive.toml").write_text('[cluster]\njoin = "10.0.0.1:6379"\n')
    monkeypatch.setattr(cluster, "own_address", lambda towards: "10.0.0.9")
    assert deployment(monkeypatch, tmp_path).names == ("ray",)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--cluster-head", "--join", "10.0.0.1:6379"], "a cluster's head, or joins one"),
        (["--join", "10.0.0.1"], "a host and a port"),
        (["--cluster-head", "--gpus", "0,1"], "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_contradictions_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit):
        deployment(monkeypatch, tmp_path, *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def reach_after(monkeypatch: pytest.MonkeyPatch, number: int, failures: int) -> float:
    """Ask for the head while that many attempts fail with this error; the seconds that it waited."""
    clock, left = 0.0, failures

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    def connect(address: Any, timeout: float) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(number, os.strerror(number))
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(socket, "create_connection", connect)
    cluster.check_reach(("10.0.0.1", 6379))
    return clock


def test_a_network_that_has_just_come_up_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reach_after(monkeypatch, errno.EHOSTUNREACH, 4) == 4 * cluster.NETWORK_LOOK_S
    with pytest.raises(Refused, match=r"no head at 10\.0\.0\.1 port 6379: No route to host"):
        reach_after(monkeypatch, errno.EHOSTUNREACH, 1000)


def test_a_head_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="Connection refused"):
        reach_after(monkeypatch, errno.ECONNREFUSED, 1)
