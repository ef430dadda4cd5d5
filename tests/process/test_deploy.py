"""deploy_competitive.sh and stop_competitive.sh as they are, around small stand-ins for the three processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tomlkit

ROOT = Path(__file__).resolve().parents[2]
# What runs before anything is installed, and what it reads.
FILES = [
    "deploy_competitive.sh",
    "stop_competitive.sh",
    "scripts/__init__.py",
    "scripts/install.sh",
    "scripts/lib.sh",
    "scripts/ops",
    "common",
    "generation/arguments.py",
    "generation/fleet/__init__.py",
    "generation/fleet/ray_environment.py",
    "generation/schema",
    "neurons/defaults.py",
    "neurons/miner/options.py",
    "neurons/miner/validators/blacklist.py",
    "pyproject.toml",
    "constraints.txt",
    "requirements",
]

PIP = """
import sys
if __name__ == "__main__":
    print("pip", *sys.argv[1:])
    open("pip-calls", "a").write(" ".join(sys.argv[1:]) + chr(10))
"""
SERVICE = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
asked = 0
open("service-arguments", "w").write(chr(10).join(sys.argv[1:]))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        status = "failed" if os.path.exists("break-service") else "ready"
        if asked == 1 or os.path.exists("slow-service"): status = "loading"
        body = dict(status=status, reason="weights of clip" , profile="tiny", profile_reason="no CUDA GPU found")
        if os.path.exists("engines"): body["engines"] = json.load(open("engines"))
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def log_message(self, *args): pass
open("logs/generation_service.log", "w").write("a line of the log\\n")
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
HTTPServer((arguments.get("--host", "127.0.0.1"), int(arguments["--port"])), Handler).serve_forever()
"""
REHEARSAL = """
import os, signal, sys, time
os.makedirs("data/rehearsal", exist_ok=True)
if os.path.exists("stubborn"): signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("data/rehearsal/network.json", "w").write("[]")
time.sleep(1000)
"""
MINER = """
import json, os, sys, time
open("miner-arguments", "w").write(chr(10).join(sys.argv[1:]))
open("miner-variables", "w").write(json.dumps(dict(os.environ)))
if os.path.exists("break-miner"): raise SystemExit("the wallet is not there")
open("run/miner.status", "w").write(json.dumps(dict(status="asking validators")))
time.sleep(0.3)
open("run/miner.status", "w").write(json.dumps(dict(status="ready")))
time.sleep(1000)
"""
BUILD = """
import os
open("builds", "a").write("build_gsplat" + chr(10))
if os.path.exists("break-build"): raise SystemExit("build_gsplat: the compiler failed")
"""
HOTKEY = "5" + "F" * 47


class Clone:
    def __init__(self, path: Path) -> None:
        self.path = path
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.path / script), *arguments],
            cwd="/",
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def deploy(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("deploy_competitive.sh", "--port", str(self.port), *arguments, **environment)

    def stop(self) -> subprocess.CompletedProcess[str]:
        return self.run("stop_competitive.sh")

    def pid(self, name: str) -> int:
        return int((self.path / "run" / f"{name}.pid").read_text())

    def write(self, name: str, content: str = "") -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(content)


def arguments(clone: Clone, process: str) -> list[str]:
    return (clone.path / f"{process}-arguments").read_text().split("\n")


def variables(clone: Clone) -> dict[str, str]:
    """Settings in the environment of the miner."""
    found = json.loads((clone.path / "miner-variables").read_text())
    return {name: value for name, value in found.items() if name.startswith("COMPETITIVE_")}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def make_clone(path: Path) -> Clone:
    """A clone with an environment that counts as installed; its pip only notes how it was called."""
    clone = Clone(path)
    for name in FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, path / name)
    for package in ("generation", "neurons", "neurons/miner", "neurons/miner/validators"):
        clone.write(f"{package}/__init__.py")
    clone.write("generation/serve_competitive.py", SERVICE)
    clone.write("neurons/rehearsal.py", REHEARSAL)
    clone.write("neurons/serve_miner_competitive.py", MINER)
    clone.write("scripts/ops/build_gsplat.py", BUILD)
    clone.write("pip.py", PIP)
    (path / ".venv/bin").mkdir(parents=True)
    (path / ".venv/bin/python").symlink_to(sys.executable)
    install(path)
    (path / "pip-calls").unlink()
    return clone


def install(path: Path, *extras: str) -> subprocess.CompletedProcess[str]:
    command = [str(path / "scripts/install.sh"), *(extras or ("miner", "service"))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    clone = make_clone(tmp_path / "a clone")
    yield clone
    clone.stop()


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One clear line and a non-zero exit."""
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.slow
def test_deploy_twice_then_stop(clone: Clone) -> None:
    first = clone.deploy()
    assert first.returncode == 0, first.stderr + first.stdout
    assert "weights of clip" in first.stdout  # the progress of loading
    assert "asking validators" in first.stdout  # and of the miner
    assert "nothing is submitted to the Bittensor network" in first.stdout
    assert f"http://127.0.0.1:{clone.port}/studio/" in first.stdout
    pids = {name: clone.pid(name) for name in ("generation_service", "rehearsal", "miner")}
    assert all(map(alive, pids.values()))

    started = time.monotonic()
    second = clone.deploy()
    assert time.monotonic() - started < 5
    assert second.returncode == 0
    assert "Already running" in second.stdout
    assert {name: clone.pid(name) for name in pids} == pids
    refused(clone.deploy("--workers", "2"), "other flags", "stop_competitive.sh")

    stopped = clone.stop()
    assert stopped.returncode == 0
    assert not any(map(alive, pids.values()))
    assert [line.split(":")[0] for line in stopped.stdout.splitlines()] == ["miner", "rehearsal", "generation_service"]
    assert not list((clone.path / "run").glob("*.pid"))
    assert "nothing was running" in clone.stop().stdout


def test_flags_reach_the_processes(clone: Clone, tmp_path: Path) -> None:
    config = tmp_path / "my config.yaml"
    config.write_text("iters: 3\n")
    result = clone.deploy(
        "--profile=tiny", "--flux-steps", "2", "--config", str(config), "--validation-threshold", "0.7",
        "--workers", "3", "--netuid", "18", "--blacklist", "180", HOTKEY, "--network", "test",
        "--wallet.name", "cold", "--wallet.hotkey", "hot", "--blacklist-file", str(config),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "REHEARSAL" not in result.stdout
    assert not (clone.path / "run/rehearsal.pid").exists()
    service = (clone.path / "service-arguments").read_text().split("\n")
    assert service == [
        "--profile", "tiny", "--config", str(config), "--port", str(clone.port), "--flux-steps", "2",
        "--validation-threshold", "0.7", "--miner-url", "http://127.0.0.1:10007", "--profile", "tiny",
    ]  # fmt: skip
    miner = (clone.path / "miner-arguments").read_text().split("\n")
    assert miner == [
        "--validation-threshold", "0.7", "--netuid", "18", "--wallet.name", "cold", "--wallet.hotkey", "hot",
        "--workers", "3", "--blacklist", "180", HOTKEY, "--blacklist-file", str(config),
        "--workers", "3", "--status-file", "run/miner.status",
    ]  # fmt: skip
    assert variables(clone) == {
        "COMPETITIVE_NETWORK_NAME": "test", "COMPETITIVE_MINER_ENDPOINTS": f"http://127.0.0.1:{clone.port}",
    }  # fmt: skip


def test_passwords_stand_on_no_command_line(clone: Clone) -> None:
    result = clone.deploy(
        "--generation.endpoint", "https://miner:secret,1@far/a", "--network", "wss://node/secret",
        "--wallet.name", "cold", "--workers", "3",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    commands = [psutil.Process(clone.pid(name)).cmdline() for name in ("generation_service", "miner")]
    assert "secret" not in str([*commands, arguments(clone, "miner"), arguments(clone, "service"), result.stdout])
    assert variables(clone) == {
        "COMPETITIVE_NETWORK_NAME": "wss://node/secret",
        "COMPETITIVE_MINER_ENDPOINTS": f"http://127.0.0.1:{clone.port} https://miner:secret%2C1@far/a",
    }


@pytest.mark.slow
def test_more_flags_reach_the_processes(clone: Clone, tmp_path: Path) -> None:
    models = tmp_path / "my models.yaml"
    models.write_text("{}\n")
    result = clone.deploy(
        "--gpus", "0,1", "--max-gaussians", "60000", "--memory-class", "24gb", "--models", str(models),
        "--retries", "0", "--min-reward", ".5", "--allowed-hosts", "gpu.example,[::1]",
        "--metrics-port", "0", "--generation.endpoint", "http://10.0.0.2:10006", "https://far/a",
        "--generation.endpoint=http://10.0.0.3:1", "--workers", "8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    service = arguments(clone, "service")
    for flag, value in (
        ("--models", str(models)), ("--max-gaussians", "60000"), ("--memory-class", "24gb"), ("--gpus", "0,1"),
        ("--allowed-hosts", "gpu.example,[::1]"),
    ):  # fmt: skip
        assert service[service.index(flag) + 1] == value
    miner = arguments(clone, "miner")
    endpoints = variables(clone)["COMPETITIVE_MINER_ENDPOINTS"].split()
    assert endpoints[0] == f"http://127.0.0.1:{clone.port}"
    assert endpoints[1:] == ["http://10.0.0.2:10006", "https://far/a", "http://10.0.0.3:1"]
    assert "--miner-url" not in service  # --metrics-port 0: nothing to show
    for flag, value in (("--retries", "0"), ("--min-reward", "0.5"), ("--metrics-port", "0")):
        assert miner[miner.index(flag) + 1] == value
    refused(clone.deploy("--generation.endpoint", "http://10.0.0.2:10006"), "other flags")


@pytest.mark.parametrize(
    ("engines", "workers"),
    [('[{"at_once": 1}]', 4), ('[{"at_once": 4}, {"at_once": 3}]', 7), ('[{"at_once": 99}]', 64)],
)
@pytest.mark.slow
def test_as_many_workers_as_the_services_have_places(clone: Clone, engines: str, workers: int) -> None:
    clone.write("engines", engines)
    result = clone.deploy()
    assert result.returncode == 0, result.stderr
    miner = (clone.path / "miner-arguments").read_text().split("\n")
    assert miner[miner.index("--workers") + 1] == str(workers)
    assert f" {workers} workers " in result.stdout
    assert f" {workers} workers " in clone.deploy().stdout


@pytest.mark.slow
def test_another_machine_that_does_not_answer_counts_as_one_service(clone: Clone) -> None:
    clone.write("engines", '[{"at_once": 5}]')
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        other = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert " 9 workers " in clone.deploy("--generation.endpoint", other).stdout


@pytest.mark.slow
def test_an_endpoint_that_is_nowhere_does_not_end_the_deployment(clone: Clone) -> None:
    result = clone.deploy("--generation.endpoint", "https://miner:secret@nowhere.invalid/")
    assert result.returncode == 0, result.stderr
    assert " 8 workers " in result.stdout


@pytest.mark.slow
def test_a_wallet_means_finney(clone: Clone) -> None:
    assert clone.deploy("--wallet.name", "cold").returncode == 0
    assert variables(clone)["COMPETITIVE_NETWORK_NAME"] == "finney"
    # What the toy models make would earn penalties there.
    assert arguments(clone, "service")[-2:] == ["--profile", "full"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--port", "70000"], ["--port 70000", "1..65535"]),
        (["--workers", "0"], ["--workers 0", "1..64"]),
        (["--workers", "1;ls"], ["--workers 1;ls"]),
        (["--profile", "huge"], ["--profile huge", "auto, full or tiny"]),
        (["--validation-threshold", "1.5"], ["--validation-threshold 1.5", "0..1"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["--network", "mainnet"], ["--network", "mainnet", "finney"]),
        (["--network", "finney"], ["needs --wallet.name"]),
        (["--blacklist", "x"], ["--blacklist x"]),
        (["--blacklist-file=~/nobody"], ["--blacklist-file", "~/nobody: No such file"]),
        (["--flux-steps"], ["--flux-steps", "expected one argument"]),
        (["--turbo"], ["unrecognized arguments: --turbo"]),
        (["--retries", "11"], ["--retries 11", "0..10"]),
        (["--min-reward", "2"], ["--min-reward 2", "0..1"]),
        (["--metrics-port", "65536"], ["--metrics-port 65536", "0..65535"]),
        (["--generation.endpoint", "--workers", "2"], ["--generation.endpoint", "at least one"]),
        (["--generation.endpoint", "http://a", "b:1"], ["--generation.endpoint", "http://"]),
        (["--gpus", "0,"], ["--gpus 0,", "all"]),
        (["--allowed-hosts", "http://a"], ["--allowed-hosts http://a", "separated by commas"]),
        (["--max-gaussians", "100"], ["--max-gaussians 100", "7000..2000000"]),
        (["--models", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    ],
)
def test_wrong_flags_are_one_line(clone: Clone, arguments: list[str], parts: list[str]) -> None:
    refused(clone.deploy(*arguments), *parts)
    assert not (clone.path / "run").exists()


def test_help_names_every_flag(clone: Clone) -> None:
    text = clone.run("deploy_competitive.sh", "--help").stdout
    for flag in ("flux-steps", "config", "validation-threshold", "port", "host", "workers", "profile", "network",
                 "wallet.name", "wallet.hotkey", "netuid", "blacklist", "blacklist-file", "help", "models", "gpus",
                 "allowed-hosts", "max-gaussians", "memory-class", "best-of", "retries", "min-reward", "metrics-port",
                 "generation.endpoint"):  # fmt: skip
        assert f"--{flag}" in text


def test_a_busy_port_is_named_with_its_holder(clone: Clone) -> None:
    with socket.create_server(("127.0.0.1", clone.port)):
        refused(clone.deploy(), f"port {clone.port}", f"PID {os.getpid()}")
    assert not list((clone.path / "run").glob("*.pid"))


@pytest.mark.slow
def test_a_process_that_crashes_is_started_again(clone: Clone) -> None:
    assert clone.deploy().returncode == 0
    miner = psutil.Process(clone.pid("miner"))
    (before,) = miner.children()
    (clone.path / "run/miner.status").unlink()
    before.kill()
    until = time.monotonic() + 60
    while not (clone.path / "run/miner.status").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert [child.pid for child in miner.children()] != [before.pid]
    assert "The process ended (SIGKILL); it is started again in 2 s" in (clone.path / "logs/miner.log").read_text()
    assert "Already running" in clone.deploy().stdout
    (again,) = miner.children()
    assert clone.stop().returncode == 0
    assert not again.is_running()


@pytest.mark.slow
def test_one_that_crashes_again_and_again_is_no_running_one(clone: Clone) -> None:
    assert clone.deploy().returncode == 0
    miner = psutil.Process(clone.pid("miner"))
    clone.write("break-miner")
    miner.children()[0].kill()
    log = clone.path / "logs/miner.log"
    while not (log.exists() and "exit status 1" in log.read_text()):
        time.sleep(0.05)
    while (again := clone.deploy()).returncode == 0:
        pass  # a look at it in the moments in which it lives
    refused(again, "miner crashed", "see logs/miner.log and run/miner.out")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_deploy_that_is_ended_leaves_nothing_and_no_stop_comes_between(clone: Clone, how: signal.Signals) -> None:
    clone.write("slow-service")
    deploy = subprocess.Popen(
        [clone.path / "deploy_competitive.sh", "--port", str(clone.port)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(how, signal.SIG_DFL),  # whatever the tests themselves were started with
    )
    while not (clone.path / "service-arguments").exists():
        time.sleep(0.02)
    service = psutil.Process(clone.pid("generation_service"))
    refused(clone.stop(), "a deploy or stop is at work")
    os.killpg(deploy.pid, how)
    assert deploy.wait(60) == 130
    assert not alive(service.pid)
    assert not list((clone.path / "run").glob("*.pid"))
    assert "nothing was running" in clone.stop().stdout


@pytest.mark.slow
def test_a_dead_process_behind_a_stale_pid_file(clone: Clone) -> None:
    assert clone.deploy().returncode == 0
    dead = clone.pid("miner")
    os.kill(dead, signal.SIGKILL)
    while alive(dead):
        time.sleep(0.01)
    refused(clone.deploy(), "miner is dead", "stale PID file", "stop_competitive.sh")
    assert clone.stop().returncode == 0
    assert clone.deploy().returncode == 0


def test_a_pid_that_belongs_to_someone_else_now_is_never_stopped(clone: Clone) -> None:
    with subprocess.Popen(["sleep", "100"]) as stranger:
        try:
            for content in (str(stranger.pid), "-1", "", "1 2", "$(touch evil)"):
                clone.write("run/miner.pid", content)
                refused(clone.deploy(), "stale PID file")
                assert "was not running" in clone.stop().stdout
            assert stranger.poll() is None
            assert not (clone.path / "evil").exists()
        finally:
            stranger.kill()


@pytest.mark.slow
def test_two_clones_side_by_side(clone: Clone, tmp_path: Path) -> None:
    other = make_clone(tmp_path / "other")
    try:
        assert clone.deploy().returncode == 0
        assert other.deploy().returncode == 0
        clone.stop()
        assert alive(other.pid("generation_service"))
        assert alive(other.pid("miner"))
        # A PID file copied from another clone does not make its process ours.
        clone.write("run/miner.pid", str(other.pid("miner")))
        clone.stop()
        assert alive(other.pid("miner"))
    finally:
        other.stop()


@pytest.mark.slow
def test_a_service_that_fails_shows_its_reason_and_log_and_leaves_nothing(clone: Clone) -> None:
    clone.write("break-service")
    result = clone.deploy()
    assert result.returncode != 0
    assert "the generation service: weights of clip" in result.stdout
    assert "a line of the log" in result.stderr
    assert not list((clone.path / "run").glob("*.pid"))
    (clone.path / "break-service").unlink()
    assert clone.deploy().returncode == 0


@pytest.mark.slow
def test_a_miner_that_ends_takes_the_rest_with_it(clone: Clone) -> None:
    clone.write("break-miner")
    result = clone.deploy()
    assert result.returncode != 0
    assert "the wallet is not there" in result.stderr
    assert not list((clone.path / "run").glob("*.pid"))


@pytest.mark.slow
def test_what_does_not_end_is_killed(clone: Clone) -> None:
    clone.write("stubborn")
    assert clone.deploy().returncode == 0
    pid = clone.pid("rehearsal")
    started = time.monotonic()
    assert "rehearsal: killed" in clone.stop().stdout
    assert 11 < time.monotonic() - started < 25
    assert not alive(pid)


def stub(clone: Clone, name: str, script: str) -> str:
    """A PATH on which ``name`` is ``script``."""
    clone.write(f"stubs/{name}", f"#!/bin/sh\n{script}\n")
    (clone.path / "stubs" / name).chmod(0o755)
    return f"{clone.path / 'stubs'}:{os.environ['PATH']}"


@pytest.mark.slow
def test_an_environment_whose_python_is_gone_is_made_anew(clone: Clone) -> None:
    python = clone.path / ".venv/bin/python3"
    for link in (python, python.with_name("python")):
        link.unlink(missing_ok=True)
        link.symlink_to("/usr/bin/python-of-an-older-release")
    result = clone.deploy()
    assert "Making the environment" in result.stdout
    assert "could not make the environment" not in result.stderr
    assert python.exists()


def test_no_fitting_python(clone: Clone) -> None:
    shutil.rmtree(clone.path / ".venv")
    for name in ("python3", "python3.11", "python3.12", "python"):
        path = stub(clone, name, "exit 1")
    refused(clone.deploy(PATH=path), "Python 3.11 or 3.12")


@pytest.mark.slow
def test_a_missing_compiler_matters_with_a_gpu_only(clone: Clone) -> None:
    tools = clone.path / "tools"
    tools.mkdir()
    for folder in ("/usr/bin", "/bin"):
        for tool in Path(folder).iterdir():
            if tool.name not in ("c++", "g++", "nvidia-smi") and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    assert clone.deploy(PATH=str(tools)).returncode == 0
    clone.stop()
    stub(clone, "nvidia-smi", "echo 'GPU 0: NVIDIA'")
    refused(clone.deploy(PATH=f"{clone.path / 'stubs'}:{tools}"), "no C++ compiler", "gsplat")
    stub(clone, "g++", "exit 0")
    assert clone.deploy(PATH=f"{clone.path / 'stubs'}:{tools}").returncode == 0
    *_, packages, project = (clone.path / "pip-calls").read_text().splitlines()
    locks = "-r requirements/miner.txt -r requirements/service.txt -r requirements/gpu.txt"
    assert packages.endswith(f"--require-hashes --no-deps {locks}")
    assert project.endswith("--no-deps --no-build-isolation -e .")
    assert (clone.path / "builds").read_text().splitlines() == ["build_gsplat"]  # with the GPU only


def with_gpu(clone: Clone) -> str:
    """A PATH with eight cards, told slowly, and a C++ compiler, as far as the deploy script can see."""
    stub(clone, "g++", "exit 0")
    return stub(clone, "nvidia-smi", 'for n in 0 1 2 3 4 5 6 7; do echo "GPU $n: NVIDIA"; sleep 0.005; done')


@pytest.mark.slow
def test_without_a_built_gsplat_only_the_tiny_profile_goes_on(clone: Clone) -> None:
    clone.write("break-build")
    result = clone.deploy(PATH=with_gpu(clone))
    assert result.returncode != 0
    assert "the compiler failed" in result.stderr
    assert "gsplat, which a GPU needs, is not built" in result.stderr
    assert not list((clone.path / "run").glob("*.pid"))
    (clone.path / "builds").unlink()
    assert clone.deploy("--profile", "tiny", PATH=with_gpu(clone)).returncode == 0
    assert not (clone.path / "builds").exists()


def test_a_gpu_needs_python_h(clone: Clone) -> None:
    # An interpreter whose headers are not there.
    (clone.path / ".venv/bin/python").unlink()
    clone.write(
        ".venv/bin/python",
        f'#!/bin/sh\ncase $2 in *sysconfig*) echo /x/python3.12/Python.h ;; *) exec "{sys.executable}" "$@" ;; esac\n',
    )
    (clone.path / ".venv/bin/python").chmod(0o755)
    refused(
        clone.deploy(PATH=with_gpu(clone)), "no /x/python3.12/Python.h", "torch.compile", "apt install python3.12-dev"
    )


def test_the_environment_is_installed_once_for_each_need_and_change(clone: Clone) -> None:
    assert "nstall" not in install(clone.path).stdout
    assert "Installing" in install(clone.path, "dev").stdout
    assert "nstall" not in install(clone.path, "dev").stdout
    clone.write("requirements/miner.txt", "numpy==1\n")
    assert "Installing 1 packages" in install(clone.path, "miner").stdout
    calls = [line for line in (clone.path / "pip-calls").read_text().splitlines() if "install" in line]
    assert [line.removeprefix("--disable-pip-version-check --no-input install ") for line in calls] == [
        step
        for lock in ("dev", "miner")
        for step in (
            "--require-hashes -r requirements/bootstrap.txt",  # brings uv; this one does not
            f"--progress-bar off --require-hashes --no-deps -r requirements/{lock}.txt",
            "--progress-bar off --no-deps --no-build-isolation -e .",
        )
    ]


def test_a_failing_install_says_so(clone: Clone) -> None:
    clone.write("pip.py", "if __name__ == '__main__':\n    raise SystemExit('no route to the index')\n")
    clone.write("constraints.txt", "numpy==1\n")
    result = clone.deploy()
    assert result.returncode != 0
    assert "no route to the index" in result.stderr
    assert "pip could not install" in result.stderr
    assert not list((clone.path / "run").glob("*.pid"))


def test_a_registry_that_packs_files_anew_is_named_with_the_way_out(clone: Clone) -> None:
    clone.write("pip.py", "if __name__ == '__main__':\n    raise SystemExit('Hash mismatch for `numpy==1`')\n")
    clone.write("constraints.txt", "numpy==1\n")
    refused(clone.deploy(), "numpy==1 is not the file that the lock names", "scripts/install.sh --no-hashes")
    clone.write("pip.py", PIP)
    unchecked = clone.run("scripts/install.sh", "--no-hashes")
    assert unchecked.returncode == 0
    assert (clone.path / "pip-calls").read_text().endswith("-c constraints.txt -e .[miner,service]\n")
    assert clone.deploy().returncode == 0  # installs nothing again


@pytest.mark.slow
def test_after_a_reboot_deploy_starts(clone: Clone) -> None:
    # What a machine that lost its power leaves: PID files, and the mark of the boot before.
    with subprocess.Popen(["sleep", "100"]) as stranger:
        try:
            for name in ("generation_service", "rehearsal", "miner"):
                clone.write(f"run/{name}.pid", f"{stranger.pid}\n")
            clone.write("run/flags", "those of before")
            clone.write("run/boot", "another boot 4711")
            result = clone.deploy()
            assert result.returncode == 0, result.stderr
            assert "ended with the machine's restart" in result.stdout
            assert alive(clone.pid("miner"))
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.slow
def test_the_callers_search_paths_change_nothing(clone: Clone, tmp_path: Path) -> None:
    decoy = tmp_path / "decoy"
    make_clone(decoy / clone.path.name)
    (decoy / "json.py").write_text("raise SystemExit('the wrong json')\n")
    variables = {"CDPATH": str(decoy), "PYTHONPATH": str(decoy), "PYTHONHOME": str(decoy)}
    command = ["bash", f"{clone.path.name}/deploy_competitive.sh", "--port", str(clone.port)]
    result = subprocess.run(
        command, cwd=clone.path.parent, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr + result.stdout
    assert alive(clone.pid("miner"))
    assert not (decoy / clone.path.name / "run").exists()
    assert clone.run("stop_competitive.sh", **variables).returncode == 0
    assert not list((clone.path / "run").glob("*.pid"))


@pytest.mark.slow
def test_only_bash_and_a_python_are_needed(clone: Clone) -> None:
    """No sha256sum, nohup, setsid, flock, df, tail, awk."""
    for name in ("bash", "env", "dirname"):
        clone.write(f"tools/{name}")
        (clone.path / "tools" / name).unlink()
        (clone.path / "tools" / name).symlink_to(str(shutil.which(name)))
    result = clone.deploy(PATH=str(clone.path / "tools"))
    assert result.returncode == 0, result.stderr
    assert alive(clone.pid("miner"))


@pytest.mark.slow
def test_what_is_saved_needs_no_flag_the_next_time(clone: Clone) -> None:
    (clone.path / "tomlkit").symlink_to(Path(tomlkit.__file__).parent)  # of an environment that is not installed here
    saved = clone.deploy("--workers", "3", "--save")
    assert saved.returncode == 0, saved.stderr
    assert "workers = 3" in (clone.path / "competitive.toml").read_text()
    assert " 3 workers " in saved.stdout
    assert "Already running" in clone.run("deploy_competitive.sh").stdout
    clone.stop()
    assert " 3 workers " in clone.run("deploy_competitive.sh").stdout
    refused(clone.run("deploy_competitive.sh", "--workers", "2"), "other flags")
