"""A hub on loopback, a cache for its files, and a clone to deploy from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from generation.weights import download
from tests.support.deployment import Clone, make_clone
from tests.support.downloads import BIREFNET, CHUNK, MVDREAM, birefnet, mvdream
from tests.support.fake_hub import LARGE, digest, serve


@pytest.fixture
def hub():
    with serve({str(BIREFNET.repo): birefnet(), str(MVDREAM.repo): mvdream()}) as running:
        yield running


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def large(hub) -> bytes:
    """Weights that arrive in more than one piece."""
    weights = save({"w": np.arange(CHUNK * 3 // 8, dtype="float32")})
    hub.repositories[BIREFNET.repo].files["model.safetensors"] = weights
    return weights


@pytest.fixture
def whole(cache) -> download.Plan:
    """BiRefNet, fetched by someone else: all of it is in the hub's cache, and no lock."""
    repository = birefnet()
    files = tuple(
        download._File(name, len(content), digest(content), len(content) >= LARGE)
        for name, content in repository.files.items()
        if name != "pytorch_model.bin"
    )
    plan = download.Plan(BIREFNET, repository.commit, files)
    plan.blobs.mkdir(parents=True)
    folder = plan.blobs.parent / "snapshots" / plan.commit
    folder.mkdir(parents=True)
    for file in files:
        (plan.blobs / file.digest).write_bytes(repository.files[file.name])
        (folder / file.name).symlink_to(plan.blobs / file.digest)
    return plan


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = make_clone(tmp_path / "a clone")
    yield made
    made.stop()
