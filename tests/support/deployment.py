"""A clone to deploy from, around small stand-ins for the three processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

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
open("logs/generation_service.log", "a").write("a line of the log\\n")
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


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One clear line and a non-zero exit."""
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


def stub(clone: Clone, name: str, script: str) -> str:
    """A PATH on which ``name`` is ``script``."""
    clone.write(f"stubs/{name}", f"#!/bin/sh\n{script}\n")
    (clone.path / "stubs" / name).chmod(0o755)
    return f"{clone.path / 'stubs'}:{os.environ['PATH']}"


def with_key(clone: Clone, hotkey: str = "default") -> str:
    """A HOME in which the wallet "cold" has this hotkey."""
    clone.write(f".bittensor/wallets/cold/hotkeys/{hotkey}", "{}")
    return str(clone.path)


def with_gpu(clone: Clone) -> str:
    """A PATH with eight cards, told slowly, and a C++ compiler, as far as the deploy script can see."""
    stub(clone, "g++", "exit 0")
    return stub(clone, "nvidia-smi", 'for n in 0 1 2 3 4 5 6 7; do echo "GPU $n: NVIDIA"; sleep 0.005; done')
