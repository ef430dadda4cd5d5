"""A fleet over a Ray cluster around the stand-in pipeline, told what to do in JSON lines: for tests, on a machine of
theirs.

cluster_driver.py HEAD:PORT TOKEN FOLDER

``{"ask": PROMPT, "seed": N}`` is answered, whenever it is done, with ``{"seed": N, "device": …, "pid": …}`` or
``{"seed": N, "error": …}``; between these lines come ``{"engines": {DEVICE: [STATUS, NUMBER OF REQUESTS, REASON]}}``,
each time that this changes. The end of the input ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from generation.fleet import remote
from generation.fleet.actors import ActorEngine, ClusterFleet
from generation.fleet.cluster import connect
from tests.support.fleet_harness import PATIENCE_S, ask, pid_of, settings

LOADER = "tests.support.fleet_standin:load"
LOOK_S = 0.02


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


async def answer(fleet: ClusterFleet, prompt: str, seed: int) -> None:
    try:
        asset = await ask(fleet, prompt, seed)
    except Exception as error:
        say(seed=seed, error=f"{type(error).__name__}: {error}")
    else:
        say(seed=seed, device=asset.report.device, pid=pid_of(asset))


async def tell(fleet: ClusterFleet) -> None:
    told: Any = None
    while True:
        now = {each["device"]: [each["status"], len(each["active"]), each["reason"]] for each in fleet.health()}
        if now != told:
            say(engines=now)
            told = now
        await asyncio.sleep(LOOK_S)


async def main(address: str, token: str, folder: str) -> None:
    # A test need not wait as long as users do.
    remote.FIRST_PAUSE_S = 0.2
    ActorEngine.silent_checks = 3
    fleet = ClusterFleet(connect(address, Path(token)), partial(settings, Path(folder)), 16, LOADER)
    fleet.start()
    tasks = {asyncio.create_task(tell(fleet))}
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        message = json.loads(line)
        tasks.add(asyncio.create_task(answer(fleet, message["ask"], message["seed"])))
    await asyncio.to_thread(fleet.stop, PATIENCE_S)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
