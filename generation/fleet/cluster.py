"""All calls of Ray. No other module imports it, and this one only to join a cluster."""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generation.engine.engine import describe
from generation.fleet.ray_environment import ENGINE, environment
from generation.schema.hosts import parse_address

NAMESPACE = "generation"
#: Seconds to wait for a head that does not listen yet.
HEAD_S = 60.0
MOST_WORDS = 300  # characters of an error of Ray's

log = logging.getLogger("generation.fleet.cluster")


class ClusterError(Exception):
    """The cluster cannot be used. The message is one line that says why."""


@dataclass(frozen=True)
class Machine:
    """One of Ray's nodes: each start of Ray on a machine makes a new one.

    ``address`` is its IP address. ``engines`` is how many it takes: one per GPU; without GPUs, as many as it declares.
    """

    node: str
    address: str
    engines: int
    has_gpu: bool
    cores: int


class Cluster:
    """The connection to a cluster. A process has at most one."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from generation.fleet.actor import EngineActor

        self._on = NodeAffinitySchedulingStrategy
        self._class = ray.remote(EngineActor)

    def machines(self) -> list[Machine]:
        """The machines that are alive and have room for engines. Asks the head."""
        found = []
        for node in self._ray.nodes():
            resources = node["Resources"]
            gpus = int(resources.get("GPU", 0))
            engines = gpus or int(resources.get(ENGINE, 0))
            if node["Alive"] and engines:
                cores = int(resources.get("CPU", 0))
                found.append(Machine(node["NodeID"], node["NodeManagerAddress"], engines, gpus > 0, cores))
        return found

    def begin(self, machine: Machine) -> Any:
        """Create an actor on the machine. Returns its handle at once."""
        needs = {"num_gpus": 1} if machine.has_gpu else {"num_gpus": 0, "resources": {ENGINE: 1}}
        here = self._on(machine.node, soft=False)
        return self._class.options(
            num_cpus=0, max_restarts=0, max_task_retries=0, max_concurrency=100, scheduling_strategy=here, **needs
        ).remote()

    def end(self, actor: Any) -> None:
        """Kill the actor's process, if it still runs."""
        self._ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """Close the connection. Ray then ends its actors."""
        self._ray.shutdown()


def connect(address: str, token_file: Path) -> Cluster:
    """Join the cluster whose head listens at ``address`` ("HOST:PORT"), from one of its machines.

    Waits HEAD_S for the head. Changes this process's environment, since Ray reads it there. Raises ClusterError.
    """
    try:
        variables = environment(token_file)
    except ValueError as error:
        raise ClusterError(error) from error
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(variables)
    _wait_for(address)
    try:
        import ray  # reads the environment
    except ImportError as error:
        raise ClusterError("the package ray is not installed: it is in the extra [cluster]") from error
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "5")  # whoever listens there may not be Ray
    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise ClusterError(f"the Ray cluster at {address} can not be joined: {_refusal(error, token_file)}") from error
    return Cluster(ray)


def _refusal(error: BaseException, token_file: Path) -> str:
    text = f"{error} {error.__cause__ or ''}"
    if "InvalidAuthToken" in text or "Unauthenticated" in text:
        return f"its token is not the one in {token_file}"
    if "No node info found" in text:
        return "Ray does not run on this machine, which must be one of the cluster's"
    return error_in_words(error.__cause__ or error)


def _wait_for(address: str) -> None:
    """Wait until somebody listens there: Ray would wait for minutes, then end the process. Raises ClusterError."""
    end = time.monotonic() + HEAD_S
    while True:
        try:
            socket.create_connection(parse_address(address), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise ClusterError(f"no Ray head listens at {address}: {error}") from error
        time.sleep(0.5)


def error_in_words(error: BaseException) -> str:
    """An error in one short line: Ray's own messages are pages long."""
    kind, text = type(error).__name__, str(error)
    if kind == "ActorUnschedulableError":
        return "its machine has left the cluster"
    if kind == "ActorUnavailableError":
        return "its machine does not answer"
    if kind == "ActorDiedError":
        if "node has died" in text or "node was terminated" in text:
            return "its machine has left the cluster"
        if "ray.kill" in text:
            return "it was killed"
        if "worker process has died" in text:
            return "its process was killed or crashed"
    # For an error of our own code, Ray's text is a traceback in colours: take the error itself.
    cause = getattr(error, "cause", None)
    line = describe(cause) if isinstance(cause, BaseException) else text or kind
    line = " ".join(line.split())
    return line if len(line) <= MOST_WORDS else f"{line[:MOST_WORDS]} ..."
