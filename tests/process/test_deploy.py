"""deploy_competitive.sh and stop_competitive.sh as they are, around small stand-ins for the three processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import tomlkit

from tests.support.deployment import HOTKEY, Clone, alive, arguments, make_clone, refused, variables, with_key


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
    clone.write("docs/GUIDE.md", "of a git pull")
    assert "Already running" in clone.deploy().stdout
    clone.write("neurons/miner/new.py", "of a git pull")
    refused(clone.deploy(), "code or configs have changed", "stop_competitive.sh")

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
        "--wallet.name", "cold", "--wallet.hotkey", "hot", "--blacklist-file", str(config), HOME=with_key(clone, "hot"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "REHEARSAL" not in result.stdout
    assert "PROFILE tiny ON test" in result.stdout
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
        "--wallet.name", "cold", "--workers", "3", HOME=with_key(clone),
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
    missing = clone.deploy("--wallet.name", "cold", HOME=str(clone.path))
    refused(missing, "cold/hotkeys/default", "No such file", ": none. Copy it there", "step 4", "--wallet.name")
    assert not (clone.path / "service-arguments").exists()
    result = clone.deploy("--wallet.name", "cold", HOME=with_key(clone))
    assert result.returncode == 0
    assert "PROFILE tiny" not in result.stdout
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
        refused(clone.deploy(), f"port {clone.port}", f"PID {os.getpid()}", "--port")
    assert not list((clone.path / "run").glob("*.pid"))


def test_a_hotkey_that_is_elsewhere_is_named(clone: Clone) -> None:
    home = with_key(clone, "hot")
    refused(clone.deploy("--wallet.name", "cold", HOME=home), "cold/hotkeys/default", ": cold/hot. Copy it there")


def test_a_metrics_port_that_is_taken_is_told(clone: Clone) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = clone.deploy("--metrics-port", str(port))
    assert result.returncode == 0
    assert "goes without metrics, and Studio" in result.stdout
    assert f"port {port}: Address already in use, held by PID {os.getpid()}" in result.stdout


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
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(how, signal.SIG_DFL),  # whatever the tests themselves were started with
    )
    while not (clone.path / "service-arguments").exists():
        time.sleep(0.02)
    service = psutil.Process(clone.pid("generation_service"))
    refused(clone.stop(), "a deploy or stop is at work")
    os.killpg(deploy.pid, how)
    _, said = deploy.communicate(timeout=60)
    assert deploy.returncode == 130
    assert "nothing of it runs. Run it again to go on from here" in said
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
    clone.write("logs/generation_service.log", "of the time before\n")
    result = clone.deploy()
    assert result.returncode != 0
    assert "the generation service: weights of clip" in result.stdout
    assert "a line of the log" in result.stderr
    assert "of the time before" not in result.stderr
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
