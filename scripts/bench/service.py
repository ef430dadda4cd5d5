"""Measure the service on this machine: seconds until ready, seconds per stage and request when warm, peak memory.

Starts a service of its own on a free port for each config, sends one request to warm it up, then the prompts.

With --background N: how long a request takes alone, and while N requests with X-Priority: background are in flight.

    python -m scripts.bench.service [--profile tiny] [--config PATH ...] [--requests 3] [--background 4]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
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


def generate(url: str, prompt: str, seed: int, priority: str = "interactive") -> tuple[float, dict, str]:
    """Seconds of one request, its stages, and what came of it."""
    form = urllib.parse.urlencode({"prompt": prompt, "seed": seed}).encode()
    began = time.perf_counter()
    request = urllib.request.Request(f"{url}/generate/", form, {"X-Priority": priority})
    with http.open(request, timeout=PATIENCE_S) as answer:
        body, headers = answer.read(), answer.headers
    outcome = f"{headers['X-Num-Gaussians']} Gaussians, score {headers['X-Score']}" if body else headers["X-Rejected"]
    return time.perf_counter() - began, json.loads(headers["X-Seconds"]), outcome


def beside(url: str, requests: int, background: int) -> dict:
    """Seconds of requests, one after the other: alone, then while so many in the background are in flight."""

    def ask(i: int) -> float:
        return generate(url, PROMPTS[i % len(PROMPTS)], i + 1)[0]

    stopping, done = threading.Event(), []

    def keep_busy(first: int) -> None:
        for seed in itertools.count(1000 * first):
            if stopping.is_set():
                return
            generate(url, PROMPTS[seed % len(PROMPTS)], seed, "background")
            done.append(seed)

    alone = [ask(i) for i in range(requests)]
    threads = [threading.Thread(target=keep_busy, args=(number + 1,)) for number in range(background)]
    for thread in threads:
        thread.start()
    with_others = []
    for i in range(requests):
        time.sleep(3 + 4 * i)  # so that they meet the background in different stages
        with_others.append(ask(i))
        print(f"  {PROMPTS[i % len(PROMPTS)]}: alone {alone[i]:.1f} s, beside {with_others[i]:.1f} s", flush=True)
    before = len(done)
    stopping.set()
    for thread in threads:
        thread.join()
    return {
        "background": background,
        "alone_s": round(statistics.median(alone), 2),
        "beside_s": round(statistics.median(with_others), 2),
        "ratio": round(statistics.median(with_others) / statistics.median(alone), 2),
        "worst_ratio": round(max(b / a for a, b in zip(alone, with_others, strict=True)), 2),
        "background_done": [before, len(done)],
    }


def measure(profile: str, config: Path, requests: int, background: int = 0) -> dict:
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
            if background:
                return {"config": config.name, **beside(url, requests, background)}
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
    parser.add_argument("--background", type=int, default=0, help="measure beside so many")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{psutil.cpu_count()} cores, load {load:.1f} before the start", flush=True)
    configs = args.config or TINY_CONFIGS
    for result in [measure(args.profile, config, args.requests, args.background) for config in configs]:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
