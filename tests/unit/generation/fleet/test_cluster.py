"""What is made of Ray's answers: machines and errors.

Ray reads its token when it is first imported. Tests that join a cluster must come before: none imports it at the top.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from generation.fleet import cluster
from generation.fleet.cluster import Cluster, ClusterError, Machine, connect, error_in_words

ROOT = Path(__file__).resolve().parents[4]
WORKER = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
)
NODE = "The actor died because its node has died. Node Id: ab12 "
KILLED = "The actor is dead because it was killed by `ray.kill`."


def died(cause: str) -> Exception:
    """As Ray makes them."""
    from ray.core.generated import common_pb2

    context: Any = common_pb2
    return ray_error("ActorDiedError", context.ActorDiedErrorContext(error_message=cause, actor_id=bytes(16)))


def ray_error(name: str, *arguments: Any) -> Exception:
    from ray import exceptions

    error: Exception = getattr(exceptions, name)(*arguments)
    return error


class Ray:
    """Says which nodes there are, as ``ray.nodes()``."""

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self._nodes = nodes

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": str(number), "Alive": True, "NodeManagerAddress": f"10.0.0.{number}", **node}
            for number, node in enumerate(self._nodes)
        ]

    def remote(self, actor: type) -> type:
        return actor


def test_a_machine_has_an_engine_for_each_gpu_or_as_many_as_it_declares() -> None:
    ray = Ray(
        {"Resources": {"CPU": 16.0, "GPU": 2.0, "engine": 3.0}},
        {"Resources": {"CPU": 4.0, "engine": 1.0}},
        {"Resources": {"CPU": 4.0}},
        {"Resources": {"GPU": 1.0}, "Alive": False},
    )
    assert Cluster(ray).machines() == [
        Machine("0", "10.0.0.0", engines=2, has_gpu=True, cores=16),
        Machine("1", "10.0.0.1", engines=1, has_gpu=False, cores=4),
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (partial(died, WORKER), "its process was killed or crashed"),
        (partial(died, NODE), "its machine has left the cluster"),
        (partial(died, KILLED), "it was killed"),
        (partial(ray_error, "ActorUnavailableError", "grpc: " * 99, b"x" * 16), "its machine does not answer"),
        (partial(ray_error, "ActorUnschedulableError", "the node is gone"), "its machine has left the cluster"),
        (partial(ray_error, "RayTaskError", "begin", "Traceback\n" * 50, ValueError("no\nsu")), "ValueError: no su"),
        (ConnectionError, "ConnectionError"),
    ],
)  # fmt: skip
def test_errors_are_one_short_line(error: Callable[[], Exception], words: str) -> None:
    assert error_in_words(error()) == words


def test_a_long_error_is_cut() -> None:
    assert len(error_in_words(RuntimeError("word " * 1000))) < 310


def test_no_token_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is sent."""
    monkeypatch.setattr(cluster, "_wait_for", lambda address: pytest.fail("it went on"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(ClusterError, match=r"cluster_token_file: .*No such file"):
        connect("127.0.0.1:1", tmp_path / "none")


def test_where_nobody_listens_the_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "HEAD_S", 0.0)
    with pytest.raises(ClusterError, match=r"no Ray head listens at 127\.0\.0\.1:1: .*refused"):
        cluster._wait_for("127.0.0.1:1")


def test_one_machine_is_served_where_ray_is_not_installed() -> None:
    code = "import sys; sys.modules['ray'] = None; import generation.serve_competitive"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0123456789abcdef" * 4)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(cluster, "_wait_for", lambda address: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"ray is not installed.*\[cluster\]"):
        connect("127.0.0.1:1", token)
