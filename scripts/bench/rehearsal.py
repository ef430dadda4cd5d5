"""Measure the miner with one candidate a task beside as many as cost nothing: real service, real axons, a rehearsal.

Starts a service of its own and then, one after the other, the same rehearsal for `--best-of 1` and `--best-of auto`:
the same validators, with the same prompts in the same order: shapes and colours that training never saw together,
objects on others, and pictures. Meanwhile somebody asks the service in person every now and then. Cooldowns and
penalties are shorter than the subnet's, so that there are tasks enough. Tasks of the first minutes are not counted:
validators that are in step are moved apart there, once.

Scores are compared task by task (a validator's nth is the same prompt in both), an empty result being 0; the interval
is of 95 %, by bootstrap over tasks.

    python -m scripts.bench.rehearsal [--minutes 25] [--validators 3] [--config configs/tiny_lgm.yaml]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from neurons.miner.app import CompetitiveMiner
from neurons.miner.options import MinerOptions
from neurons.rehearsal.network import RehearsalNetwork, load_pictures
from neurons.rehearsal.rules import Limits
from scripts.bench.service import ROOT, free_port, generate, wait_until_ready
from scripts.tiny_pack.best_of import stacks
from scripts.tiny_pack.captions import caption, evaluation_specs

COOLDOWN = 2.0  # throttle periods
PERSON_EVERY_S = 40.0
PERSON_PROMPT = "a green mug"
RESAMPLINGS = 10_000
Scores = dict[tuple[int, int], float]


def limits(throttle: float) -> Limits:
    return replace(Limits(), task_cooldown=COOLDOWN * throttle, throttle_period=throttle, failure_penalty=throttle)


def prompts() -> list[str]:
    rng = random.Random(0)
    return [caption(spec, rng, plain=True) for spec in [*evaluation_specs(), *stacks(48)]]


def person(url: str, seed: int) -> float:
    return generate(url, PERSON_PROMPT, seed)[0]


async def side(url: str, best_of: Any, folder: Path, args: argparse.Namespace) -> tuple[dict[str, Any], Scores]:
    """One rehearsal: what to print, and the scores by validator and number of its task."""
    truth = folder / "truth.jsonl"
    network = RehearsalNetwork(
        folder, url, args.validators, limits(args.throttle), prompts(), pictures=load_pictures(), truth=truth
    )
    options = MinerOptions(
        network="rehearsal",
        wallet_name="rehearsal",
        wallet_hotkey="miner",
        wallet_path=folder / "wallets",
        endpoints=(url,),
        spool=folder / "spool",
        ledger=folder / "ledger.sqlite",
        rehearsal_state=folder,
        metrics_port=0,
        blacklist=(),
        best_of=best_of,
    )
    miner = CompetitiveMiner(options)
    asked: list[float] = []
    await asyncio.to_thread(network.__enter__)
    try:
        running = asyncio.create_task(miner.run())
        end = time.monotonic() + 60 * args.minutes
        while (left := end - time.monotonic()) > 0 and not running.done():
            await asyncio.sleep(min(PERSON_EVERY_S, left))
            if time.monotonic() < end:
                asked.append(await asyncio.to_thread(person, url, 1 + len(asked)))
        miner.stop()
        await running
    finally:
        await asyncio.to_thread(network.__exit__)
    found, scores = told(truth, folder / "ledger.sqlite", 60 * args.settle)
    return {"best of": best_of, **found, **waits("person's seconds", asked)}, scores


def waits(name: str, seconds: list[float]) -> dict[str, Any]:
    return {name: {"median": round(statistics.median(seconds), 2), "most": round(max(seconds), 2), "of": len(seconds)}}


def told(truth: Path, ledger: Path, settle: float) -> tuple[dict[str, Any], Scores]:
    """What the validators' books and the miner's say of tasks that were assigned `settle` seconds after the first."""
    lines = [json.loads(line) for line in truth.read_text().splitlines()]
    assigned = [line for line in lines if line["event"] == "assigned"]
    numbers: dict[int, int] = {}
    given: dict[str, tuple[float, tuple[int, int]]] = {}
    for line in assigned:
        numbers[line["uid"]] = number = numbers.get(line["uid"], -1) + 1
        if line["time"] >= assigned[0]["time"] + settle:
            given[line["task"]] = line["time"], (line["uid"], number)
    ends = [
        line
        for line in lines
        if line["event"] == "submission" and line["outcome"] not in ("repetition", "refused") and line["task"] in given
    ]
    scores = {given[line["task"]][1]: line["score"] or 0.0 for line in ends}
    held = [line["began"] - given[line["task"]][0] for line in ends]
    accepted = sum(line["outcome"] == "accepted" for line in ends)
    with sqlite3.connect(ledger) as books:
        made = books.execute(
            "SELECT task_id, candidates, score - first_score FROM generations WHERE outcome = 'generated'"
        ).fetchall()
    made = [row for row in made if row[0] in given]
    candidates = [count or 1 for _, count, _ in made]
    found = {
        "tasks assigned": len(given),
        "results": len(ends),
        "accepted": accepted,
        "share accepted": round(accepted / max(len(ends), 1), 3),
        "mean score": round(statistics.mean(scores.values() or [0.0]), 4),
        "violations": sum(line["event"] == "early" for line in lines),
        "held, mean and most": [round(statistics.mean(held or [0.0]), 1), round(max(held, default=0.0), 1)],
        "candidates, mean and most": [round(statistics.mean(candidates or [0]), 1), max(candidates, default=0)],
        "gain by the service's score": round(statistics.mean([gain or 0.0 for *_, gain in made] or [0.0]), 4),
    }
    return found, scores


def compared(one: Scores, best: Scores) -> dict[str, Any]:
    """By how much the scores of `best` are higher, over the tasks that both answered."""
    gains = [best[task] - one[task] for task in sorted(one.keys() & best.keys())]
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(gains, k=len(gains))) for _ in range(RESAMPLINGS))
    interval = [round(means[round(share * (RESAMPLINGS - 1))], 4) for share in (0.025, 0.975)]
    return {"same tasks": len(gains), "score higher by": round(statistics.fmean(gains), 4), "95 %": interval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="of each side")
    parser.add_argument("--settle", type=float, default=2.0, help="minutes of it that are not counted")
    parser.add_argument("--validators", type=int, default=3)
    parser.add_argument("--throttle", type=float, default=30.0, help="seconds")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_lgm.yaml")
    args = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "generation.serve_competitive", "--profile", args.profile]
        command += ["--config", str(args.config), "--port", str(port), "--log-file", f"{folder}/service.log"]
        service = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until_ready(service, url)
            for name in list(logging.root.manager.loggerDict):  # bittensor's import lets none of them speak
                if name.startswith("neurons"):
                    logging.getLogger(name).setLevel(logging.WARNING)
            person(url, 0)
            print(json.dumps(waits("person's seconds, nobody beside", [person(url, seed) for seed in range(1, 6)])))
            scores = []
            for best_of in (1, "auto"):
                own = Path(folder) / str(best_of)
                own.mkdir()
                found, its = asyncio.run(side(url, best_of, own, args))
                print(json.dumps(found), flush=True)
                scores.append(its)
            print(json.dumps(compared(*scores)))
        finally:
            service.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                service.wait(60)


if __name__ == "__main__":
    main()
