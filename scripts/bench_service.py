"""Measure the service on this machine: seconds until ready, seconds per stage and request when warm, peak memory.

Starts a service of its own on a free port for each config, sends one request to warm it up, then the prompts.

    python -m scripts.bench_service [--profile tiny] [--config PATH ...] [--requests 3]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TINY_CONFIGS = (ROOT / "configs" / "tiny_mv_fast.yaml", ROOT / "configs" / "tiny_mv_ultra_fast.yaml")
PROMPTS = ("a red cube", "a blue chair", "a green mug", "a yellow house", "a purple mushroom", "a white rocket")
PATIENCE_S = 1800
http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_ready(process: subprocess.Popen, url: str) -> None:
    """Raises SystemExit with the service's own reason when it fails."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the service ended with status {process.returncode}")
        try:
            health = json.loads(http.open(f"{url}/health", timeout=5).read())
        except OSError:
            health = {"status": "starting"}
        if health["status"] == "ready":
            return
        if health["status"] == "failed":
            raise SystemExit(f"the service failed: {health.get('reason')}")
        time.sleep(0.2)
    raise SystemExit("the service was not ready in time")


def generate(url: str, prompt: str, seed: int) -> tuple[float, dict, str]:
    """Seconds of one request, its stages, and what came of it."""
    form = urllib.parse.urlencode({"prompt": prompt, "seed": seed}).encode()
    began = time.perf_counter()
    with http.open(urllib.request.Request(f"{url}/generate/", form), timeout=PATIENCE_S) as answer:
        body, headers = answer.read(), answer.headers
    outcome = f"{headers['X-Num-Gaussians']} Gaussians, score {headers['X-Score']}" if body else headers["X-Rejected"]
    return time.perf_counter() - began, json.loads(headers["X-Seconds"]), outcome


def measure(profile: str, config: Path, requests: int) -> dict:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "generation.serve_competitive", "--profile", profile, "--config", str(config)]
        command += ["--port", str(port), "--log-file", f"{folder}/service.log"]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until_ready(process, url)
            ready = time.perf_counter() - began
            print(f"{config.name}: ready after {ready:.1f} s", flush=True)
            generate(url, PROMPTS[0], 0)
            totals, stages = [], []
            for i in range(requests):
                prompt = PROMPTS[i % len(PROMPTS)]
                seconds, parts, outcome = generate(url, prompt, i + 1)
                totals.append(seconds)
                stages.append(parts)
                print(f"  {prompt}: {seconds:.1f} s, {outcome}", flush=True)
            peak = peak_memory(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    parts = {name: round(statistics.median(s.get(name, 0.0) for s in stages), 2) for name in stages[0]}
    return {
        "config": config.name,
        "ready_s": round(ready, 1),
        "request_s": round(statistics.median(totals), 2),
        "stages_s": parts,
        "peak_memory_gib": peak,
    }


def peak_memory(pid: int) -> float:
    """Highest resident memory of the process so far, GiB (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    return round(kib / 2**20, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--config", type=Path, action="append")
    parser.add_argument("--requests", type=int, default=3)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{psutil.cpu_count()} cores, load {load:.1f} before the start", flush=True)
    for result in [measure(args.profile, config, args.requests) for config in args.config or TINY_CONFIGS]:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
