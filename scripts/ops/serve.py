"""Becomes one of the processes of a deployment: ``serve.py ray | generation_service | rehearsal | miner``.

For systemd, pm2 and whatever else restarts processes itself. The settings are those of competitive.toml and of the
environment; what runs is what deploy_competitive.sh would start. Standard library only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.ops import deploy, environment, probe, processes

LOOK_S = 2.0


def command(deployment: deploy.Deployment, name: str) -> list[str]:
    """What to run. For the miner it waits for the generation service, whose places it has to know."""
    if name == "miner" and deployment.workers is None:
        _wait_for(deployment.url)
        deployment.workers = deployment.places()
    return [str(environment.PYTHON), "-m", processes.MODULES[name], *deployment.arguments(name)]


def _wait_for(url: str) -> None:
    until = time.monotonic() + probe.LOADING_S
    while time.monotonic() < until:
        try:
            if probe.health_of(url)["status"] == "ready":
                return
        except (OSError, HTTPException, ValueError, LookupError):
            pass
        time.sleep(LOOK_S)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in processes.MODULES:
        print(f"usage: serve.py {' | '.join(processes.MODULES)}", file=sys.stderr)
        return 2
    os.chdir(environment.ROOT)
    for folder in ("logs", "data", "run"):
        Path(folder).mkdir(exist_ok=True)
    try:
        deployment = deploy.Deployment(deploy.parse([], environment.ROOT))
        if arguments[0] not in deployment.names:
            print(f"no {arguments[0]}: the settings ask for {', '.join(deployment.names)}")
            return 0
        if deployment.cluster is not None and arguments[0] == "ray":
            deployment.cluster.check(deployment.profile == "tiny")
        words = command(deployment, arguments[0])
        variables = {**deployment.variables(arguments[0]), "PYTHONUNBUFFERED": "1"}
    except processes.Refused as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    os.execve(words[0], words, variables)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
