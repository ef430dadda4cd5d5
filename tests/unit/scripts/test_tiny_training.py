"""The tiny pack's training loop: how long it goes on, the learning rate, and gradients that are not finite."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import CLIPTokenizer

from scripts.tiny_pack import train_background, train_clip, train_flux, train_mvdream, training
from scripts.tiny_pack.captions import ObjectSpec
from scripts.tiny_pack.data import Pool


def test_a_run_ends_within_the_seconds_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data's count, and a call that is shorter than the minutes still sees the learning rate fall."""
    now, rates = 1000.0, []
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "argv", f"train --minutes 60 --within 400 --device cpu --work {tmp_path}".split())
    args = training.arguments("", minutes=1)
    now += 100  # until there is data
    module = torch.nn.Linear(1, 1)
    step = torch.optim.AdamW.step

    def watched(optimiser: torch.optim.AdamW, *rest: object) -> object:
        rates.append(optimiser.param_groups[0]["lr"])
        return step(optimiser, *rest)

    def loss() -> torch.Tensor:
        nonlocal now
        now += 1
        return module(torch.ones(1, 1)).square().mean()

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    _, run = training.fit("line", module, loss, args, lr=1.0)
    assert run == {"steps": 301, "minutes": 5.0, "final_loss": run["final_loss"]}
    assert now == 1000 + 400 + 1
    assert rates[-1] == pytest.approx(0.02)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second a look."""
    seconds = count(1000.0)
    monkeypatch.setattr(training.time, "monotonic", lambda: next(seconds))


def arguments_of(monkeypatch: pytest.MonkeyPatch, words: str):
    monkeypatch.setattr(sys, "argv", ["train", *words.split()])
    return training.arguments("", minutes=1)


def spoiled(module: torch.nn.Linear, steps: Iterator[bool]) -> Callable[[], torch.Tensor]:
    """The square of what `module` makes of 1, with gradients that are NaN, and a finite loss, where `steps` say so."""

    def loss() -> torch.Tensor:
        value = module(torch.ones(1, 1)).square().mean()
        return value + (value * 0).sqrt() if next(steps) else value

    return loss


def test_a_step_without_finite_gradients_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: None, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments_of(monkeypatch, f"--minutes 30 --device cpu --work {tmp_path}")
    module = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(module.weight, 2.0)
    average, run = training.fit("line", module, spoiled(module, (i % 40 == 3 for i in count())), args, lr=0.5)
    assert run["steps"] > 200
    assert run["final_loss"] < 0.1
    assert all(bool(p.isfinite().all()) for p in [*module.parameters(), *average.parameters()])
    assert "steps skipped: gradients not finite" in capsys.readouterr().out


def test_a_run_that_never_has_finite_gradients_ends_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: None
) -> None:
    args = arguments_of(monkeypatch, f"--minutes 30 --device cpu --work {tmp_path}")
    module = torch.nn.Linear(1, 1)
    before = module.weight.item()
    with pytest.raises(FloatingPointError, match="line: the gradients of 30 of 30 steps were not finite"):
        training.fit("line", module, spoiled(module, (True for _ in count())), args, lr=0.1)
    kept = torch.load(tmp_path / "line.pt", weights_only=True)
    assert kept["module"]["weight"].item() == kept["average"]["weight"].item() == before
    assert kept["step"] == 30


def test_on_a_gpu_training_attends_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward pass gives NaN on H100 and H200 (pytorch/pytorch#196678)."""
    before = (
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
    )
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        arguments_of(monkeypatch, "--device cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.backends.cudnn.benchmark = before[2]


@pytest.mark.parametrize(
    ("trainer", "words", "encoder"),
    [(train_flux, "", "clip"), (train_mvdream, "--tune", "mvdream/tokenizer")],
)
def test_words_become_the_tokens_that_the_text_tower_knows(
    trainer: ModuleType, words: str, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No two fits of the BPE give the same ids: trainers read the tokenizer that the text tower was trained with."""

    class Stop(Exception):
        pass

    seen = []

    def tokens(tokenizer: object, texts: list[list[str]], *rest: object) -> torch.Tensor:
        if not isinstance(tokenizer, CLIPTokenizer):
            return torch.zeros(1)
        seen.append(tokenizer)
        raise Stop

    def render_pool(count: int, cameras: object, size: int, *rest: object, **more: object) -> Pool:
        views = 1 if trainer is train_flux else 8
        rgba = torch.zeros(1, views, 4, size, size, dtype=torch.uint8)
        return Pool([ObjectSpec("cube", "red")], rgba, torch.eye(4).expand(1, views, 4, 4))

    monkeypatch.setattr(sys, "argv", ["train", "--device", "cpu", "--work", str(tmp_path), *words.split()])
    monkeypatch.setattr(trainer, "tokens", tokens)
    monkeypatch.setattr(trainer, "render_pool", render_pool)
    with pytest.raises(Stop):
        trainer.main()
    known = CLIPTokenizer.from_pretrained(training.PACK / encoder, local_files_only=True)
    assert seen[0].get_vocab() == known.get_vocab()


def test_smaller_objects_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they are put, none is cut off: its area is the square of its size."""
    monkeypatch.setattr(train_background, "SMALLER", 1.0)
    torch.manual_seed(0)
    rgba = torch.zeros(64, 4, 64, 64)
    rgba[:, :, 2:62, 2:62] = 0.5
    small = train_background.made_smaller(rgba)
    share = small.sum((1, 2, 3)) / rgba.sum((1, 2, 3))
    assert share.amin() < 0.15
    assert share.amax() < 1.02
    assert share.amin() > 0.95 * train_background.LEAST**2
    edge = torch.cat([small[..., 0, :], small[..., -1, :], small[..., 0], small[..., -1]], -1)
    assert edge.amax() < 0.26  # half of a pixel of the border at most


def test_some_objects_keep_their_size() -> None:
    torch.manual_seed(0)
    rgba = torch.rand(64, 4, 16, 16)
    same = (train_background.made_smaller(rgba) - rgba).abs().amax((1, 2, 3)) < 1e-5
    assert 32 < int(same.sum()) < 60


def test_each_model_of_the_pack_is_trained_after_those_that_it_needs(tmp_path: Path) -> None:
    log, python = tmp_path / "order", tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\nname="$2 $3"\necho "begin $name" >>{log}\nsleep 0.1\necho "end $name" >>{log}\n'
    )
    python.chmod(0o755)
    script = Path(training.__file__).parent / "train_all.sh"
    folders = [str(tmp_path / "pack"), str(tmp_path / "work")]
    subprocess.run(["bash", script, *folders], env=os.environ | {"PYTHON": str(python)}, check=True, timeout=60)
    lines = [line.replace("scripts.tiny_pack.", "").replace(" --pack", "") for line in log.read_text().splitlines()]
    needs = {
        "train_mvdream": ["train_vae mvdream", "train_clip"],
        "train_flux": ["train_vae flux", "train_clip"],
        "train_background": ["train_vae flux"],
        "train_lgm": ["train_flux", "train_background", "train_mvdream"],
        "train_quality": ["train_lgm"],
    }
    for name, before in needs.items():
        assert all(lines.index(f"end {each}") < lines.index(f"begin {name}") for each in before), name


def test_clip_learns_what_fits_and_not_what_nobody_can_say() -> None:
    red_cube, green_cube, red_car = ObjectSpec("cube", "red"), ObjectSpec("cube", "green"), ObjectSpec("car", "red")
    stack = ObjectSpec("cube", "red", base="cylinder", base_colour="green")
    images = [red_cube, green_cube, red_car, stack, red_cube]  # the last one has its colours exchanged
    texts = [
        (red_cube, train_clip.ALL, "yes no no no ?"),
        (green_cube, train_clip.ALL, "no yes no no ?"),
        (red_car, train_clip.ALL, "no no yes no no"),
        (stack, train_clip.ALL, "no no no yes no"),
        (red_cube, train_clip.SHAPE, "yes yes no ? yes"),
        (stack, train_clip.SHAPE, "no no no yes no"),
        (red_cube, train_clip.COLOUR, "yes no yes ? ?"),
        (red_cube, train_clip.NOTHING, "no no no no no"),
    ]
    about = train_clip.attributes([*images, *(spec for spec, _, _ in texts)])
    exchanged = torch.tensor([False] * 4 + [True])
    named = torch.tensor([each for _, each, _ in texts])
    fits, unknown = train_clip.matches(about[:5], exchanged, about[5:], named)
    words = [
        ["?" if u else "yes" if f else "no" for f, u in zip(*row, strict=True)]
        for row in zip(fits.T, unknown.T, strict=True)
    ]
    assert words == [said.split() for _, _, said in texts]
