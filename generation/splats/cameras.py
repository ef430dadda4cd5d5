"""Pinhole cameras, and the one place where orbit angles become matrices.

The world is right handed with y up; the object's front faces +z. The camera at azimuth 0 stands on +z, azimuth grows
counter-clockwise seen from above (at 90 degrees the camera stands on +x), and positive elevation lifts it above the
object.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """C pinhole cameras in OpenCV axes: x right, y down, z forward."""

    viewmats: Tensor  # (C, 4, 4) world -> camera, rigid
    Ks: Tensor  # (C, 3, 3) intrinsics in pixels; the centre of the top left pixel is at (0.5, 0.5)

    def __len__(self) -> int:
        return self.viewmats.shape[0]

    def __getitem__(self, index: slice | Tensor | list[int]) -> Cameras:
        return Cameras(self.viewmats[index], self.Ks[index])

    def to(self, device: torch.device | str) -> Cameras:
        return Cameras(self.viewmats.to(device), self.Ks.to(device))

    @property
    def positions(self) -> Tensor:
        """(C, 3) camera centres in the world."""
        rotation, translation = self.viewmats[:, :3, :3], self.viewmats[:, :3, 3]
        return -(rotation.transpose(1, 2) @ translation[:, :, None])[:, :, 0]

    @property
    def camera_to_world(self) -> Tensor:
        """(C, 4, 4) poses in OpenGL axes (x right, y up, z back), as multi-view diffusion models take them."""
        poses = torch.zeros_like(self.viewmats)
        flip = self.viewmats.new_tensor([1.0, -1.0, -1.0])
        poses[:, :3, :3] = self.viewmats[:, :3, :3].transpose(1, 2) * flip
        poses[:, :3, 3] = self.positions
        poses[:, 3, 3] = 1.0
        return poses


def orbit(
    elevation: float | Tensor,
    azimuth: float | Tensor,
    radius: float | Tensor,
    fovy: float,
    width: int,
    height: int,
    target: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Cameras:
    """Cameras on a sphere of `radius` (world units) around `target`, looking at it, upright.

    `elevation` and `azimuth` are in degrees; they and `radius` are numbers or (C,) tensors, broadcast together.
    `fovy` is the vertical field of view in degrees; pixels are square. Raises ValueError for a field of view outside
    0..180 degrees or an empty image.
    """
    if not 0.0 < fovy < 180.0:
        raise ValueError(f"fovy is {fovy}, expected degrees between 0 and 180")
    if width < 1 or height < 1:
        raise ValueError(f"image size is {width} x {height}, expected at least 1 x 1")
    device = next((v.device for v in (elevation, azimuth, radius) if isinstance(v, Tensor)), torch.device("cpu"))
    angles = [torch.as_tensor(v, dtype=torch.float64, device=device).reshape(-1) for v in (elevation, azimuth, radius)]
    el, az, distance = torch.broadcast_tensors(*angles)
    el, az = torch.deg2rad(el), torch.deg2rad(az)

    outward = torch.stack([el.cos() * az.sin(), el.sin(), el.cos() * az.cos()], dim=1)
    forward = -outward
    # From the azimuth alone, so that it is defined at the poles too.
    right = torch.stack([az.cos(), torch.zeros_like(az), -az.sin()], dim=1)
    down = torch.linalg.cross(forward, right)
    position = distance[:, None] * outward + torch.tensor(target, dtype=torch.float64, device=device)

    rotation = torch.stack([right, down, forward], dim=1)
    viewmats = torch.eye(4, dtype=torch.float64, device=device).repeat(len(az), 1, 1)
    viewmats[:, :3, :3] = rotation
    viewmats[:, :3, 3] = -(rotation @ position[:, :, None])[:, :, 0]

    focal = height / (2.0 * math.tan(math.radians(fovy) / 2.0))
    K = torch.tensor([[focal, 0.0, width / 2.0], [0.0, focal, height / 2.0], [0.0, 0.0, 1.0]], device=device)
    return Cameras(viewmats.float(), K.repeat(len(az), 1, 1))
