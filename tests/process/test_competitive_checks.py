"""The ten checks themselves: they must fail when something is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import test_competitive as checks
from generation.pipeline.pipeline import Asset, Job, Report, Scores
from generation.splats import ply
from generation.splats.gaussians import Gaussians
from neurons.miner import options
from neurons.miner.tasks.task_manager import AsyncTaskManager
from scripts.ops import environment
from tests.support.service_harness import Service, StandInPipeline, serving, wait_until


def splat(n: int = 7000) -> Gaussians:
    quats = torch.tensor([0.5, 0.5, 0.5, 0.5]).repeat(n, 1)
    return Gaussians(torch.rand(n, 3), quats, torch.full((n, 3), -3.0), torch.full((n,), 2.0), torch.zeros(n, 1, 3))


class Pipeline(StandInPipeline):
    """Answers with ``content`` and scores the right prompt high."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content
        self.seconds = {"text_to_image": 0.5, "background": 0.1, "dreamgaussian": 2.0}

    def _one(self, job: Job) -> Asset | Exception:
        seed = job.request.seed
        if not self.content:
            return Asset(b"", Report(seed, 0.2, seconds=self.seconds, rejected="score 0.20 under 0.60"))
        return Asset(self.content, Report(seed, 0.75, num_gaussians=7000, seconds=self.seconds))

    def validate(self, ply: bytes, prompt: Any, *previews: Any) -> Scores:
        score = 0.75 if prompt == checks.PROMPT else 0.1
        return Scores(score=score, alignment_score=score, iqa=None, ssim=0.0, lpips=None)


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[tuple[Service, checks.Service]]:
    with serving(lambda _, progress: Pipeline(request.param)) as service:
        wait_until(lambda: service.engine.status == "ready")
        about = checks.ready(service.url)
        assert about is not None
        yield service, checks.Service(service.url, about)


def verdicts(subject: checks.Service, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    for name, check in checks.CHECKS[1:7]:
        checks.run(name, check, subject)
    lines = capsys.readouterr().out.splitlines()
    return {line[6:].partition(":")[0]: line[:4] for line in lines}


@pytest.mark.parametrize("running", [ply.write(splat())], indirect=True, ids=["good"])
def test_a_good_service_passes(running: tuple[Service, checks.Service], capsys: pytest.CaptureFixture[str]) -> None:
    result = verdicts(running[1], capsys)
    assert len(result) == 6
    assert set(result.values()) == {"PASS"}


@pytest.mark.parametrize("running", [b""], indirect=True, ids=["rejected"])
def test_a_rejected_splat_fails_the_pipeline_and_leaves_nothing_to_look_at(
    running: tuple[Service, checks.Service], capsys: pytest.CaptureFixture[str]
) -> None:
    result = verdicts(running[1], capsys)
    assert result["full pipeline"] == "FAIL"
    assert result["PLY structure valid"] == result["CLIP scores a right prompt above a wrong one"] == "SKIP"
    assert result["FLUX generation"] == "PASS"


def big_endian(content: bytes) -> bytes:
    """The same for a reader of any PLY, and nothing for a validator's."""
    head, end, body = content.replace(b"little", b"big", 1).partition(b"end_header\n")
    return head + end + np.frombuffer(body, "<f4").astype(">f4").tobytes()


BROKEN = {
    "big": big_endian(ply.write(splat())),
    "opacity": ply.write(splat()).replace(b"float opacity", b"float opacity_"),
    "few": ply.write(splat(6999)),
    "comment": ply.write(splat()).replace(b"ply\n", b"ply\ncomment x\n", 1),
    "nan": ply.write(splat())[:-4] + b"\x00\x00\xc0\x7f",
    "short": ply.write(splat())[:-4],
}


@pytest.mark.parametrize("running", BROKEN.values(), indirect=True, ids=BROKEN.keys())
def test_a_broken_ply_fails(running: tuple[Service, checks.Service], capsys: pytest.CaptureFixture[str]) -> None:
    assert verdicts(running[1], capsys)["PLY structure valid"] == "FAIL"


@pytest.mark.parametrize("running", [ply.write(splat())], indirect=True, ids=["good"])
def test_a_stage_that_did_not_run_fails(running: tuple[Service, checks.Service]) -> None:
    checks_subject = running[1]
    _, headers, _ = checks_subject.generated()
    headers.replace_header("X-Seconds", '{"background": 0.1}')
    with pytest.raises(checks.Failed, match="text_to_image"):
        checks.flux_generation(checks_subject)
    with pytest.raises(checks.Failed, match="dreamgaussian"):  # nothing was found to cut out
        checks.background_removal(checks_subject)
    headers.replace_header("X-Seconds", '{"dreamgaussian": 2.0}')
    with pytest.raises(checks.Failed, match="background"):
        checks.background_removal(checks_subject)


@pytest.mark.parametrize("running", [ply.write(splat())], indirect=True, ids=["good"])
def test_a_clip_that_can_not_tell_prompts_apart_fails(
    running: tuple[Service, checks.Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = Scores(score=0.7, alignment_score=0.7, iqa=None, ssim=0.0, lpips=None)
    monkeypatch.setattr(Pipeline, "validate", lambda *_: same)
    with pytest.raises(checks.Failed, match=r"0\.70 for 'a red cube', 0\.70 for"):
        checks.clip_tells_prompts_apart(running[1])


def test_without_a_service_the_reason_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    subject = checks.NoService("clip is missing")
    assert not checks.run("full pipeline", checks.full_pipeline, subject)
    assert capsys.readouterr().out == "FAIL  full pipeline: clip is missing\n"
    assert checks.run("PLY", checks.ply_structure_valid, subject)
    assert capsys.readouterr().out.startswith("SKIP")


def test_a_wrong_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.importlib.metadata.version
    monkeypatch.setattr(checks.importlib.metadata, "version", lambda name: "0.1" if name == "einops" else real(name))
    with pytest.raises(checks.Failed, match=r"einops 0.1 \(want "):
        checks.dependencies_installed(checks.NoService(""))


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.importlib.metadata.version

    def version(name: str) -> str:
        if name == "einops":
            raise checks.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(checks.importlib.metadata, "version", version)
    with pytest.raises(checks.Failed, match=r"^einops missing \(want [0-9.]+\)$"):
        checks.dependencies_installed(checks.NoService(""))


def test_a_module_that_does_not_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        if name == "neurons.broken":
            raise ImportError("a typing error")

    modules = [SimpleNamespace(name=f"{package}.broken") for package in ("common", "neurons")]
    walk = lambda _, prefix: [each for each in modules if each.name.startswith(prefix)]  # noqa: E731
    monkeypatch.setattr(checks.pkgutil, "walk_packages", walk)
    monkeypatch.setattr(checks, "importlib", SimpleNamespace(import_module=load))
    with pytest.raises(checks.Failed, match=r"^neurons.broken: ImportError: a typing error$"):
        checks.all_imports_work(checks.NoService(""))


def test_a_gpu_that_torch_can_not_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(checks.Failed, match=r"nvidia-smi lists one, and torch .* can use none"):
        checks.gpu_detected(checks.NoService(""))


def test_the_miner_checks_pass_with_the_miners_classes() -> None:
    nothing = checks.NoService("")
    assert "180" in checks.uid_180_blacklisted(nothing)
    assert "4 tasks" in checks.task_manager_works(nothing)


def test_a_uid_that_is_not_left_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "parse", lambda _: SimpleNamespace(blacklist=()))
    with pytest.raises(checks.Failed, match=r"of 179 and 180, the miner asks \[179, 180\]"):
        checks.uid_180_blacklisted(checks.NoService(""))


def test_validators_that_are_asked_one_after_the_other_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    pull, one_at_a_time = AsyncTaskManager._pull, asyncio.Lock()

    async def alone(manager: AsyncTaskManager, validator: Any) -> Any:
        async with one_at_a_time:
            return await pull(manager, validator)

    monkeypatch.setattr(AsyncTaskManager, "_pull", alone)
    monkeypatch.setattr(checks, "ASKING_S", 0.3)
    with pytest.raises(checks.Failed, match="4 validators were not all asked"):
        checks.task_manager_works(checks.NoService(""))


def test_one_task_for_all_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    following, first = AsyncTaskManager.next_assignment, list[Any]()

    async def same(manager: AsyncTaskManager) -> Any:
        first.append(await following(manager))
        return first[0]

    monkeypatch.setattr(AsyncTaskManager, "next_assignment", same)
    with pytest.raises(checks.Failed, match="1 different tasks from 4 validators"):
        checks.task_manager_works(checks.NoService(""))


@pytest.mark.parametrize(("found", "status", "said"), [("", 0, "1 of 1 checks passed"), ("bad", 1, "1 checks failed")])
def test_the_exit_status_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: str, status: int, said: str
) -> None:
    def check(_: checks.Service) -> str:
        checks.expect(not found, found)
        return "fine"

    monkeypatch.setattr(sys, "argv", ["test_competitive.py"])
    monkeypatch.setattr(checks, "CHECKS", [("one", check)])
    monkeypatch.setattr(checks, "enter_environment", lambda: None)
    monkeypatch.setattr(checks, "service", lambda: contextlib.nullcontext(checks.NoService("")))
    monkeypatch.chdir(checks.ROOT)
    assert checks.main() == status
    assert said in capsys.readouterr().out


def test_without_an_environment_it_says_how_to_make_one(tmp_path: Path) -> None:
    shutil.copy(checks.ROOT / "test_competitive.py", tmp_path)
    command = [sys.executable, str(tmp_path / "test_competitive.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"{tmp_path / '.venv'} is missing: scripts/test.sh makes it, and so does ./deploy_competitive.sh"
    ]
