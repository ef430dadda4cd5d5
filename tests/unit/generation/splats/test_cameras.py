"""Camera conventions: where named points appear, and the axes of the poses that guidance gets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.splats.cameras import Cameras, orbit
from generation.splats.gaussians import Gaussians
from generation.splats.rasterize import rasterize

FRONT, RIGHT, TOP = (0.0, 0.0, 0.4), (0.4, 0.0, 0.0), (0.0, 0.4, 0.0)  # of the object, that faces +z


def project(cameras: Cameras, point: tuple[float, float, float], view: int = 0) -> tuple[float, float, float]:
    """Pixel column, pixel row and depth of a point in the world."""
    x, y, z = (cameras.viewmats[view] @ torch.tensor([*point, 1.0]))[:3]
    u, v, w = cameras.Ks[view] @ torch.stack([x, y, z])
    return (u / w).item(), (v / w).item(), w.item()


def test_from_the_front():
    camera = orbit(0.0, 0.0, 2.0, 49.1, 100, 80)
    assert torch.allclose(camera.positions, torch.tensor([[0.0, 0.0, 2.0]]), atol=1e-6)
    assert project(camera, (0.0, 0.0, 0.0)) == pytest.approx((50.0, 40.0, 2.0), abs=1e-4)
    assert project(camera, FRONT)[2] == pytest.approx(1.6)  # nearer
    column, row, _ = project(camera, RIGHT)
    assert column > 55
    assert row == pytest.approx(40)
    column, row, _ = project(camera, TOP)
    assert column == pytest.approx(50)
    assert row < 35


def test_from_the_side_at_azimuth_90_the_camera_is_on_plus_x():
    camera = orbit(0.0, 90.0, 2.0, 49.1, 100, 100)
    assert torch.allclose(camera.positions, torch.tensor([[2.0, 0.0, 0.0]]), atol=1e-6)
    assert project(camera, RIGHT)[2] == pytest.approx(1.6)
    assert project(camera, FRONT)[0] < 45  # the object looks to the left of the picture


def test_positive_elevation_looks_down_on_the_object():
    camera = orbit(30.0, 0.0, 2.0, 49.1, 100, 100)
    assert torch.allclose(camera.positions, torch.tensor([[0.0, 1.0, math.sqrt(3.0)]]), atol=1e-6)
    assert project(camera, FRONT)[1] > 50
    assert project(camera, TOP)[1] < 50
    assert project(camera, TOP)[2] < 2.0


def test_the_view_from_straight_above_is_upright():
    camera = orbit(90.0, 0.0, 2.0, 49.1, 100, 100)
    assert torch.isfinite(camera.viewmats).all()
    assert project(camera, RIGHT)[0] > 55
    assert project(camera, FRONT)[1] > 55  # the front points to the picture's bottom


def test_vertical_field_of_view_and_square_pixels():
    camera = orbit(0.0, 0.0, 2.0, 60.0, 300, 200)
    edge = 2.0 * math.tan(math.radians(30.0))
    assert project(camera, (0.0, edge, 0.0))[:2] == pytest.approx((150.0, 0.0), abs=1e-3)
    assert project(camera, (edge, 0.0, 0.0))[:2] == pytest.approx((250.0, 100.0), abs=1e-3)


def test_target_is_in_the_middle():
    camera = orbit(-20.0, 75.0, 1.5, 49.1, 64, 64, target=(0.3, -0.2, 0.7))
    assert project(camera, (0.3, -0.2, 0.7)) == pytest.approx((32.0, 32.0, 1.5), abs=1e-4)


def test_angles_are_broadcast():
    cameras = orbit(torch.tensor([0.0, 10.0, 20.0]), 45.0, torch.tensor([1.0, 2.0, 3.0]), 49.1, 64, 64)
    assert len(cameras) == 3
    assert cameras.Ks.shape == (3, 3, 3)
    assert torch.allclose(cameras.positions.norm(dim=1), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(cameras[1:].viewmats, cameras.viewmats[1:])
    assert cameras.viewmats.dtype == cameras.Ks.dtype == torch.float32


@settings(deadline=None)
@given(st.floats(-90, 90), st.floats(-720, 720), st.floats(0.1, 100))
def test_every_camera_is_a_rigid_right_handed_frame(elevation, azimuth, radius):
    cameras = orbit(elevation, azimuth, radius, 49.1, 64, 64)
    rotation = cameras.viewmats[0, :3, :3]
    assert torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-5)
    assert torch.linalg.det(rotation).item() == pytest.approx(1.0, abs=1e-5)
    assert cameras.viewmats[0, 3].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert rotation[0, 1].item() == pytest.approx(0.0, abs=1e-6)  # no roll: the picture's horizontal is level


def test_camera_to_world_has_opengl_axes():
    cameras = orbit(torch.tensor([0.0, 25.0]), torch.tensor([0.0, 140.0]), 2.0, 49.1, 64, 64)
    poses = cameras.camera_to_world
    expected = torch.eye(4)
    expected[2, 3] = 2.0
    assert torch.allclose(poses[0], expected, atol=1e-6)  # on +z, x right, y up, z towards the viewer
    back = poses[1, :3, 2]
    assert torch.allclose(2.0 * back, poses[1, :3, 3], atol=1e-5)  # z points away from the origin that it looks at
    flipped = poses @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    assert torch.allclose(cameras.viewmats @ flipped, torch.eye(4).expand(2, 4, 4), atol=1e-5)


def test_rasteriser_draws_points_where_the_camera_puts_them():
    cameras = orbit(torch.tensor([0.0, 35.0]), torch.tensor([20.0, 250.0]), 2.0, 49.1, 65, 49)
    for point in (FRONT, RIGHT, TOP):
        dot = Gaussians(
            torch.tensor([point]), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), -6.0), torch.tensor([8.0]),
            torch.zeros(1, 1, 3),
        )  # fmt: skip
        _, alpha, _ = rasterize(dot, cameras, 65, 49, torch.zeros(3))
        for view in range(2):
            row, column = divmod(alpha[view].argmax().item(), 65)
            expected = project(cameras, point, view)
            assert column == pytest.approx(expected[0] - 0.5, abs=0.51)
            assert row == pytest.approx(expected[1] - 0.5, abs=0.51)


@pytest.mark.parametrize("fovy", [0.0, 180.0, -10.0, float("nan")])
def test_impossible_field_of_view(fovy):
    with pytest.raises(ValueError, match="fovy is"):
        orbit(0.0, 0.0, 2.0, fovy, 64, 64)


def test_empty_image():
    with pytest.raises(ValueError, match="image size is 0 x 64"):
        orbit(0.0, 0.0, 2.0, 49.1, 0, 64)
