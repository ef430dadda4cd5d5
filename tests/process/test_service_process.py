"""The service as a process with real model classes, small and random: what no stand-in pipeline can show."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common import spz
from generation.splats import ply
from tests.support.service_process import service_process

OPTIONS = """
iters: 3
num_pts: 7500
ref_size: 64
render_size: 64
init: ball
density_end_iter: 0
batch_size: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def client(mini_models: Path, folder: Path) -> Iterator[httpx.Client]:
    config = folder / "config.yaml"
    config.write_text(OPTIONS)
    with service_process(folder, mini_models, config, trace=folder / "traces" / "first.json.gz") as client:
        yield client


def generate(client: httpx.Client, seed: int, path: str = "/generate/") -> httpx.Response:
    response = client.post(path, data={"prompt": "a red cube", "seed": str(seed)})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.slow
def test_same_prompt_and_seed_give_the_same_splat(client: httpx.Client) -> None:
    first, second, other = generate(client, 1), generate(client, 1), generate(client, 2)
    assert "X-Rejected" not in first.headers
    assert first.content == second.content
    assert first.content != other.content
    assert len(ply.read(first.content)) == int(first.headers["X-Num-Gaussians"])
    seconds = json.loads(first.headers["X-Seconds"])
    assert set(seconds) == {"text_to_image", "background", "dreamgaussian", "self_check"}
    assert first.headers["X-Score"] == second.headers["X-Score"]


@pytest.mark.slow
def test_the_first_request_is_traced_by_stage(client: httpx.Client, folder: Path) -> None:
    generate(client, 3)  # whether it is the first or not
    trace = json.loads(gzip.decompress((folder / "traces" / "first.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"text_to_image", "background", "dreamgaussian", "self_check", "aten::mm"} <= names
    assert sum(str(name).startswith("tick ") for name in names) == 4  # three iterations, and the check


@pytest.mark.slow
def test_metrics_have_each_stage(client: httpx.Client) -> None:
    generate(client, 3)
    metrics = client.get("/metrics").text
    for stage in ("text_to_image", "background", "dreamgaussian", "self_check"):
        assert f'generation_stage_seconds_count{{device="cpu",stage="{stage}"}}' in metrics


@pytest.mark.slow
def test_what_the_miner_packs_is_scored(client: httpx.Client) -> None:
    data = base64.b64encode(spz.compress(generate(client, 1).content)).decode()
    body = {"prompt": "a red cube", "data": data, "compression": 2}
    answer = client.post("/validate_txt_to_3d_ply/", json=body)
    assert answer.status_code == 200, answer.text
    assert all(gate["passed"] for gate in answer.json()["gates"].values())


@pytest.mark.slow
def test_a_turntable_is_filmed(client: httpx.Client) -> None:
    video = generate(client, 1, "/generate_video/")
    assert video.headers["content-type"] == "video/mp4"
    assert video.content[4:8] == b"ftyp"


@pytest.mark.slow
def test_health_names_the_models_and_their_licences(client: httpx.Client) -> None:
    models = client.get("/health").json()["models"]
    assert {model["stage"] for model in models} == {"text_to_image", "background", "mvdream", "clip"}
    assert all(model["licence"] and model["revision"] for model in models)
