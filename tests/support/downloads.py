"""The download script in a process of its own, and small repositories for a hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
from safetensors.numpy import save

from generation.settings import ROOT
from generation.weights.registry import REGISTRY, Entry
from tests.support.fake_hub import Hub, Repository

# Weights that the hub keeps outside of git, in a form that can be looked at.
WEIGHTS = save({"w": np.arange(50_000, dtype="float32")})


OTHER = save({"w": np.arange(50_000, dtype="float32")[::-1].copy()})


CHUNK = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE  # bytes that the hub's library writes at once


BIREFNET = REGISTRY["birefnet"]


MVDREAM = REGISTRY["mvdream-sd2.1"]


RMBG = REGISTRY["rmbg-2.0"]


# `python -m scripts.ops.download_weights`, but for the pauses.
AS_USERS_DO = """
import runpy
from generation.weights import download
download.PAUSE = 0
runpy.run_module("scripts.ops.download_weights", run_name="__main__", alter_sys=True)
"""


def birefnet() -> Repository:
    code = {"config.json": b"{}", "BiRefNet_config.py": b"", "birefnet.py": b"pass\n" * 500}
    assert BIREFNET.pinned
    return Repository(BIREFNET.revision, {**code, "model.safetensors": WEIGHTS, "pytorch_model.bin": b"0" * 5000})


def mvdream() -> Repository:
    weights = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")
    small = ("unet/config.json", "vae/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json")
    files = {name: WEIGHTS for name in (*weights, "text_encoder/model.safetensors")} | dict.fromkeys(small, b"{}")
    return Repository("b" * 40, {**files, "text_encoder/model.fp16.safetensors": OTHER, "README.md": b"read"})


def start(hub: Hub, cache: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return subprocess.Popen(
        [sys.executable, "-c", AS_USERS_DO, *arguments],
        env={**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(hub: Hub, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with start(hub, cache, *arguments, **environment) as process:
        output, problems = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, problems)


def blob(cache: Path, entry: Entry, name: str) -> Path:
    (path,) = (cache / "hub").glob(f"models--{str(entry.repo).replace('/', '--')}/snapshots/*/{name}")
    return path.resolve()
