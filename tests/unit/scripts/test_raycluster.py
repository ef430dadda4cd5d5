"""configs/raycluster.yaml says what deploy_competitive.sh would: the same Ray, settings, ports, and a token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from generation.arguments import COMMAND_LINE
from generation.fleet import ray_environment
from scripts.ops import cluster

ROOT = Path(__file__).resolve().parents[3]
CLUSTER, POLICY = yaml.safe_load_all((ROOT / "configs/raycluster.yaml").read_text())
HEAD = CLUSTER["spec"]["headGroupSpec"]
(WORKERS,) = CLUSTER["spec"]["workerGroupSpecs"]


def pod(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["template"]["spec"]
    return found


def test_the_version_is_the_locked_one() -> None:
    assert f"\nray=={CLUSTER['spec']['rayVersion']} " in (ROOT / "requirements/cluster.txt").read_text()


@pytest.mark.parametrize("group", [HEAD, WORKERS])
def test_ray_is_started_as_the_deploy_script_does(group: dict[str, Any], tmp_path: Path) -> None:
    from ray.scripts.scripts import start as ray_start  # not at the top: Ray reads its token when it is imported

    is_head = group is HEAD
    given = group["rayStartParams"]
    switches = {"no-monitor", "disable-usage-stats"}
    words = [f"--{key}" if key in switches else f"--{key}={value}" for key, value in given.items()]
    theirs = ray_start.make_context("start", [*words, "--head"] if is_head else words).params
    _, *ours = cluster.ray_arguments(("10.0.0.1", 6379), "10.0.0.2", is_head, 0)
    wanted = ray_start.make_context("start", ours).params
    own = {"node_ip_address", "address", "port", "block", "num_gpus"}  # KubeRay's part, or the pod's resources
    assert {key for key in wanted if theirs[key] != wanted[key]} <= own
    container = pod(group)["containers"][0]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu", "0")
    assert given["num-gpus"] == gpus
    (tmp_path / "token").write_text("0" * 64)
    (tmp_path / "token").chmod(0o600)
    settings = ray_environment.environment(tmp_path / "token", {})
    del settings["RAY_AUTH_TOKEN_PATH"]  # KubeRay gives it in a variable
    assert {each["name"]: each["value"] for each in container["env"]} == {**settings, "PYTHONPATH": "/app"}


@pytest.mark.parametrize("group", [HEAD, WORKERS])
def test_shared_memory_holds_the_object_store(group: dict[str, Any]) -> None:
    (volume,) = (each for each in pod(group)["volumes"] if each["name"] == "shm")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert cluster.STORE < 1 << 30
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod(group)["containers"][0]["volumeMounts"]


def test_the_service_is_on_the_head_and_has_the_token() -> None:
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    ray, service, _ = pod(HEAD)["containers"]
    arguments = COMMAND_LINE.parse([each.replace("$(POD_IP)", "10.0.0.1") for each in service["args"]])["service"]
    assert (arguments.profile, arguments.cluster) == ("full", "10.0.0.1:6379")
    assert service["image"] == ray["image"]
    address, token = service["env"]
    assert address == {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    assert token["name"] == "RAY_AUTH_TOKEN"
    assert token["valueFrom"]["secretKeyRef"] == {"name": CLUSTER["metadata"]["name"], "key": "auth_token"}
    assert pod(HEAD)["shareProcessNamespace"]
    shared = {each["mountPath"] for each in ray["volumeMounts"]}
    assert shared <= {each["mountPath"] for each in service["volumeMounts"]}
    assert "/tmp/ray" in shared


@pytest.mark.parametrize("group", [HEAD, WORKERS])
def test_a_kubernetes_service_sets_no_settings(group: dict[str, Any]) -> None:
    """For a Service named competitive, Kubernetes gives pods COMPETITIVE_SERVICE_HOST and COMPETITIVE_SERVICE_PORT."""
    assert pod(group)["enableServiceLinks"] is False


def test_nobody_else_reaches_its_ports() -> None:
    pods = {"matchLabels": {"ray.io/cluster": CLUSTER["metadata"]["name"]}}
    assert POLICY["spec"] == {
        "podSelector": pods, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": pods}]}]
    }  # fmt: skip


def test_every_volume_is_there() -> None:
    for group in (HEAD, WORKERS):
        mounted = {mount["name"] for each in pod(group)["containers"] for mount in each["volumeMounts"]}
        assert mounted == {each["name"] for each in pod(group)["volumes"]}


def test_the_image_is_a_target() -> None:
    images = {each["image"] for group in (HEAD, WORKERS) for each in pod(group)["containers"]}
    targets = set(re.findall(r"^FROM .* AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert {re.fullmatch(r"REGISTRY/competitive-(\S+):TAG", image)[1] for image in images} <= targets  # type: ignore[index]
