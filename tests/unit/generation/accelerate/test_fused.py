"""Own kernels against PyTorch's, in Triton's interpreter; and what needs no kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D

from generation.accelerate.fused import ResidualBlock
from generation.accelerate.kernels.group_norm import compute_statistics

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.slow
def test_kernels_compute_what_pytorch_computes():
    device = ["cuda"] if torch.cuda.is_available() else []
    environment = dict(os.environ) if device else {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "scripts.tools.compared_kernels", *device]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "autoencoder" in result.stdout


@pytest.mark.parametrize(
    "other", [{"up": True}, {"temb_channels": 16}, {"non_linearity": "gelu"}, {"output_scale_factor": 2.0}]
)
def test_blocks_of_other_kinds_are_refused(other):
    with pytest.raises(ValueError, match="can not be fused"):
        ResidualBlock(ResnetBlock2D(in_channels=8, groups=4, **{"temb_channels": None, **other}))


def test_an_image_in_another_order_is_refused():
    block = ResidualBlock(ResnetBlock2D(in_channels=8, groups=4, temb_channels=None))
    with pytest.raises(ValueError, match="expected channels last"):
        compute_statistics(torch.rand(2, 8, 3, 3), block.norms[0])
