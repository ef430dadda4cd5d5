"""TRELLIS through the whole service as a process, small and random."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image, ImageDraw

from common import spz
from generation.splats import ply
from tests.support import mini_trellis
from tests.support.service_process import service_process

CONFIG = "generator: trellis\nstructure_steps: 4\nslat_steps: 4\nstructures: 2\nmax_gaussians: 12000\n"
STAGES = {"text_to_image", "background", "trellis", "self_check"}

pytestmark = pytest.mark.slow


def write(folder: Path, mini_models: Path) -> tuple[Path, Path]:
    """A models file with a small TRELLIS beside the small others, and a config."""
    mini_trellis.build(folder)
    models, config = folder / "models.yaml", folder / "trellis.yaml"
    others = mini_models.read_text().replace("./", f"{mini_models.parent}/")
    models.write_text(f"{others}trellis: {{model: ./trellis}}\ndinov2: {{model: ./dinov2}}\nmax_batch: 2\n")
    config.write_text(CONFIG)
    return models, config


@pytest.fixture(scope="module")
def client(mini_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("service")
    with service_process(folder, *write(folder, mini_models)) as client:
        yield client


def picture() -> bytes:
    disc = Image.new("RGBA", (96, 96))
    ImageDraw.Draw(disc).ellipse((20, 20, 76, 76), "red")
    file = io.BytesIO()
    disc.save(file, "PNG")
    return file.getvalue()


def generate(client: httpx.Client, seed: int, of_picture: bool = False) -> httpx.Response:
    if of_picture:
        files = {"prompt_image_file": ("disc.png", picture(), "image/png")}
        response = client.post("/generate/", data={"seed": str(seed)}, files=files)
    else:
        response = client.post("/generate/", data={"prompt": "a red cube", "seed": str(seed)})
    assert response.status_code == 200, response.text
    return response


def test_a_text_and_a_picture_become_splats_that_arrive(client):
    for of_picture in (False, True):
        response = generate(client, 1, of_picture)
        assert "X-Rejected" not in response.headers, response.headers["X-Rejected"]
        assert set(json.loads(response.headers["X-Seconds"])) == STAGES
        gaussians = ply.read(response.content)
        assert 7000 <= len(gaussians) <= 12000
        sides = gaussians.means.amax(0) - gaussians.means.amin(0)
        assert float(sides.max()) == pytest.approx(1.5, abs=1e-4)  # in the validators' frame
        body = {
            "prompt": "a red cube",
            "data": base64.b64encode(spz.compress(response.content)).decode(),
            "compression": 2,
        }
        answer = client.post("/validate_txt_to_3d_ply/", json=body).json()
        assert all(gate["passed"] for gate in answer["gates"].values())


def test_several_at_once_are_as_each_alone(client):
    alone = ply.read(generate(client, 1).content)
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda seed: generate(client, seed), (1, 2, 3)))
    among = ply.read(together[0].content)
    assert len(among) == len(alone)
    assert float((among.means - alone.means).abs().max()) < 1e-3
    assert together[1].content != together[2].content


def test_an_empty_structure_is_a_rejection(mini_models, tmp_path):
    models, config = write(tmp_path, mini_models)
    mini_trellis.change(tmp_path, "ss_dec", out_layer__2__bias=torch.tensor([-100.0]))
    with service_process(tmp_path, models, config) as client:
        response = generate(client, 1)
        assert response.content == b""
        assert response.headers["X-Rejected"] == "structure: it has no voxel"
        assert client.get("/health").json()["status"] == "ready"
