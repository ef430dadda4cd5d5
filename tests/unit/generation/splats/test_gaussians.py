"""The fields' shapes, and rotations against the textbook's."""

from __future__ import annotations

import math

import pytest
import torch

from generation.splats.gaussians import Gaussians
from tests.support.reference_rasterizer import rotation_matrices


def make(n: int = 2) -> Gaussians:
    return Gaussians(torch.zeros(n, 3), torch.ones(n, 4), torch.zeros(n, 3), torch.zeros(n), torch.zeros(n, 9, 3))


def test_length_and_fields():
    gaussians = make(5)
    gaussians.check()
    assert len(gaussians) == 5
    assert list(gaussians.tensors()) == ["means", "quats", "log_scales", "logit_opacities", "sh"]
    assert gaussians.tensors()["sh"] is gaussians.sh


def test_rotations():
    quarter = math.sqrt(0.5)
    gaussians = make(3)
    gaussians.quats = torch.tensor([[2.0, 0, 0, 0], [quarter, 0, 0, quarter], [3 * quarter, 3 * quarter, 0, 0]])
    x, y, z = torch.eye(3)
    identity, about_z, about_x = gaussians.rotations()
    assert torch.allclose(identity, torch.eye(3))
    assert torch.allclose(about_z @ x, y, atol=1e-6)
    assert torch.allclose(about_z @ y, -x, atol=1e-6)
    assert torch.allclose(about_x @ y, z, atol=1e-6)
    assert torch.allclose(about_x @ z, -y, atol=1e-6)
    gaussians.quats = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gaussians.rotations(), rotation_matrices(gaussians.quats), atol=1e-6)


def test_detach_and_to_leave_the_original_alone():
    gaussians = make()
    gaussians.means.requires_grad_()
    assert not gaussians.detach().means.requires_grad
    assert gaussians.means.requires_grad
    assert gaussians.to("meta").sh.device.type == "meta"
    assert gaussians.sh.device.type == "cpu"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("means", torch.zeros(3), r"means has shape \(3,\), expected \(3, 3\)"),
        ("quats", torch.zeros(2, 3), "quats has shape"),
        ("log_scales", torch.zeros(1, 3), "log_scales has shape"),
        ("logit_opacities", torch.zeros(2, 1), "logit_opacities has shape"),
        ("sh", torch.zeros(2, 3), "sh has shape"),
        ("sh", torch.zeros(2, 2, 3), r"with K in \(1, 4, 9, 16\)"),
        ("sh", torch.zeros(2, 1, 4), "sh has shape"),
        ("means", torch.zeros(2, 3, dtype=torch.float16), "means has type torch.float16"),
    ],
)
def test_check_names_the_field(field, value, message):
    gaussians = make()
    setattr(gaussians, field, value)
    with pytest.raises(ValueError, match=message):
        gaussians.check()
