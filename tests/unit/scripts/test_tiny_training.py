"""The tiny pack's training loop: how long it goes on, and what becomes of the learning rate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from scripts.tiny_pack import training


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
