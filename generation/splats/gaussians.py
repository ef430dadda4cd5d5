"""The data that every other module of this package works on."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SH_COEFFICIENTS = (1, 4, 9, 16)  # per colour, for spherical harmonics of degree 0, 1, 2, 3
SH_C0 = 0.28209479177387814  # the constant basis function: colour = 0.5 + SH_C0 * sh[0]


@dataclass
class Gaussians:
    """N anisotropic 3D Gaussians, held the way 3DGS (Kerbl et al. 2023) stores them: before activation.

    All fields are float32 tensors on one device.
    """

    means: Tensor  # (N, 3) centres, world units
    quats: Tensor  # (N, 4) rotations w, x, y, z; normalised on use
    log_scales: Tensor  # (N, 3) natural logarithm of the standard deviations along the rotated axes
    logit_opacities: Tensor  # (N,) opacity = sigmoid(logit)
    sh: Tensor  # (N, K, 3) spherical harmonics, K = 1, 4, 9 or 16; colour = 0.5 + sum of basis * sh, at least 0

    def __len__(self) -> int:
        return self.means.shape[0]

    def check(self) -> None:
        """Raise ValueError naming the first field whose shape or type is not the documented one."""
        n = self.means.shape[0] if self.means.ndim else 0
        shapes = {"means": (n, 3), "quats": (n, 4), "log_scales": (n, 3), "logit_opacities": (n,)}
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, expected {shape}")
        if (
            self.sh.ndim != 3
            or self.sh.shape[0] != n
            or self.sh.shape[2] != 3
            or self.sh.shape[1] not in SH_COEFFICIENTS
        ):
            raise ValueError(f"sh has shape {tuple(self.sh.shape)}, expected ({n}, K, 3) with K in {SH_COEFFICIENTS}")
        for name, value in self.tensors().items():
            if value.dtype != torch.float32:
                raise ValueError(f"{name} has type {value.dtype}, expected torch.float32")

    def tensors(self) -> dict[str, Tensor]:
        """The five fields by name, not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rotations(self) -> Tensor:
        """(N, 3, 3) rotation matrices of the normalised quaternions."""
        w, x, y, z = torch.nn.functional.normalize(self.quats, dim=1).unbind(1)
        entries = [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ]  # fmt: skip
        return torch.stack(entries, dim=1).reshape(-1, 3, 3)

    def to(self, device: torch.device | str) -> Gaussians:
        return Gaussians(**{name: value.to(device) for name, value in self.tensors().items()})

    def detach(self) -> Gaussians:
        return Gaussians(**{name: value.detach() for name, value in self.tensors().items()})
