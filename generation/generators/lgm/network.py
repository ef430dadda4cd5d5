"""LGM (Tang et al. 2024, https://arxiv.org/abs/2402.05054): views of an object to Gaussians, a few for each pixel.

Its weights are published without a config: `BIG` is what they are. A folder may bring a `config.json` of its own with
any of `Config`'s fields.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from generation.generators.base import Checkpoint
from generation.generators.lgm.unet import UNet
from generation.schema.limits import MAX_GAUSSIANS
from generation.splats.cameras import Cameras, orbit
from generation.splats.gaussians import SH_C0, Gaussians
from generation.weights import WeightsError

WEIGHTS = ("model_fp16_fixrot.safetensors", "model.safetensors")  # the first that is there

# ImageNet statistics
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_FAINT = 0.5  # opacity; of a more opaque one two halves would look wider
_LARGEST_SCALE = 0.1  # what softplus is multiplied by


@dataclass(frozen=True)
class Config:
    """Sizes of a network, and the views that it takes; the defaults are the published one's, "big"."""

    down_channels: tuple[int, ...] = (64, 128, 256, 512, 1024, 1024)
    down_attention: tuple[bool, ...] = (False, False, False, True, True, True)
    up_channels: tuple[int, ...] = (1024, 1024, 512, 256, 128)
    up_attention: tuple[bool, ...] = (True, True, True, False, False)
    attention_heads: int = 16
    norm_groups: int = 32
    input_size: int = 256  # pixels
    # Each view's camera: degrees above the object and of azimuth, counted from its front.
    views: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.0, 90.0), (0.0, 180.0), (0.0, 270.0))
    radius: float = 1.5  # of the cameras' orbit; the object is within the cube from -1 to 1
    fovy: float = 49.1  # degrees
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)  # colour behind the object in the views
    min_opacity: float = 0.005  # of a Gaussian that is kept; outside of the box of those over `stray_opacity`: that
    stray_opacity: float = 0.005
    #: "absolute" as published, or "ray": along the pixel's ray, and off it, see `LGM.forward`
    position: str = "absolute"

    @property
    def splat_size(self) -> int:
        """Pixels of the maps of Gaussians."""
        return self.input_size >> (len(self.down_channels) - len(self.up_channels))

    @property
    def gaussians(self) -> int:
        return len(self.views) * self.splat_size**2

    @classmethod
    def load(cls, folder: Path) -> Config:
        """Of a folder's `config.json`; the published one's where there is none. Raises WeightsError."""
        path = folder / "config.json"
        if not path.exists():
            return BIG
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values = {key: _frozen(value) for key, value in values.items() if not key.startswith("_")}
            unknown = values.keys() - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
            config = cls(**values)
            config._check()
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise WeightsError(f"{path}: not a config of LGM: {error}") from error
        return config

    def _check(self) -> None:
        for way in ("down", "up"):
            widths, attends = getattr(self, f"{way}_channels"), getattr(self, f"{way}_attention")
            if not widths or len(widths) != len(attends):
                raise ValueError(f"{way}_channels and {way}_attention need as many levels, at least one")
            if any(width % self.norm_groups for width in widths):
                raise ValueError(f"{way}_channels must be multiples of norm_groups, {self.norm_groups}")
            if any(width % self.attention_heads for width, attend in zip(widths, attends, strict=True) if attend):
                raise ValueError(f"{way}_channels that attend must be multiples of {self.attention_heads} heads")
        if self.up_channels != self.down_channels[::-1][: len(self.up_channels)]:
            raise ValueError("up_channels must be the last of down_channels, backwards")
        if not self.views:
            raise ValueError("views is empty")
        if self.input_size % 2 ** (len(self.down_channels) - 1):
            raise ValueError(f"input_size {self.input_size} can not be halved {len(self.down_channels) - 1} times")
        if not 0 <= self.min_opacity <= self.stray_opacity < 1:
            raise ValueError(f"min_opacity {self.min_opacity} and stray_opacity {self.stray_opacity} must be in 0 to 1")
        if self.position not in ("absolute", "ray"):
            raise ValueError(f"position is {self.position!r}, expected 'absolute' or 'ray'")

    def cameras(self, size: int | None = None) -> Cameras:
        """Of the views, for images of `size` pixels (default: `input_size`)."""
        elevation, azimuth = (torch.tensor(column) for column in zip(*self.views, strict=True))
        size = size or self.input_size
        return orbit(elevation, azimuth, self.radius, self.fovy, size, size)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value


BIG = Config()


def plucker_rays(camera_to_world: Tensor, size: int, fovy: float) -> Tensor:
    """Plücker coordinates (V, 6, size, size) of the rays through all pixels: origin x direction, direction.

    `camera_to_world` (V, 4, 4) has OpenGL axes (x right, y up, z back). Directions have unit length.
    """
    focal = size / (2 * math.tan(math.radians(fovy) / 2))
    ticks = (torch.arange(size, device=camera_to_world.device, dtype=camera_to_world.dtype) + 0.5 - size / 2) / focal
    up, right = torch.meshgrid(-ticks, ticks, indexing="ij")
    local = torch.stack([right, up, -torch.ones_like(right)], -1).view(-1, 3)
    directions = F.normalize(local @ camera_to_world[:, :3, :3].transpose(1, 2), dim=-1)  # (V, S * S, 3)
    moments = torch.linalg.cross(camera_to_world[:, None, :3, 3].expand_as(directions), directions)
    return torch.cat([moments, directions], -1).transpose(1, 2).reshape(-1, 6, size, size)


class LGM(nn.Module):
    """The network, with its own views' rays."""

    def __init__(self, config: Config = BIG) -> None:
        super().__init__()
        self.config = config
        c = config
        channels = 14 if c.position == "absolute" else 15
        self.unet = UNet(
            9, channels, c.down_channels, c.down_attention, c.up_channels, c.up_attention,
            c.attention_heads, c.norm_groups,
        )  # fmt: skip
        self.conv = nn.Conv2d(channels, channels, 1)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype) -> LGM:
        """A folder's network. Raises WeightsError when the weights are not exactly those of its config."""
        config = Config.load(folder)
        with torch.device("meta"):
            model = cls(config)
        path = next((folder / name for name in WEIGHTS if (folder / name).exists()), folder / WEIGHTS[0])
        try:
            state = load_file(path)
            model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, strict=True, assign=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise WeightsError(f"{path}: not the weights of LGM: {' '.join(str(error).split())}") from error
        return model.to(device).eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> LGM:
        """For ``Parts.load``."""
        return cls.load(checkpoint.folder, checkpoint.device, checkpoint.dtype)

    def rays(self) -> Tensor:
        """Plücker rays (V, 6, S, S) of the config's views, on the network's device."""
        cameras = self.config.cameras().camera_to_world
        return plucker_rays(cameras, self.config.input_size, self.config.fovy).to(self.conv.weight.device)

    def forward(self, views: Tensor, rays: Tensor) -> Tensor:
        """Gaussians (B, N, 14) in float32: position 3, opacity 1, scale 3, rotation 4 (w, x, y, z), colour 3.

        `views` (B, V, 3, H, W) in 0..1 on the config's background, `rays` (V, 6, S, S) or (B, V, 6, S, S). N counts
        views, rows and columns, columns first.

        Positions are a map's own numbers, within the cube from -1 to 1. With "ray" in the config they are counted from
        the point of the pixel's ray that is nearest to the origin: first how far along the ray, then an offset x, y, z.
        """
        b, v = views.shape[:2]
        size, splat_size = self.config.input_size, self.config.splat_size
        images = views.flatten(0, 1)
        if images.shape[-1] != size or images.shape[-2] != size:
            images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
        # By numbers, not by a tensor of them: copied to the GPU, it could not be captured as a CUDA graph.
        channels = zip(images.split(1, 1), _MEAN, _STD, strict=True)
        images = torch.cat([(channel - mean) / std for channel, mean, std in channels], 1)
        rays = rays.expand(b, v, 6, size, size).flatten(0, 1)
        maps = self.conv(self.unet(torch.cat([images, rays.to(images)], 1).to(self.conv.weight.dtype), v)).float()
        if self.config.position == "absolute":
            position, opacity, scale, rotation, colour = maps.split([3, 1, 3, 4, 3], 1)
        else:
            along, offset, opacity, scale, rotation, colour = maps.split([1, 3, 1, 3, 4, 3], 1)
            if splat_size != size:
                rays = F.interpolate(rays, size=(splat_size, splat_size), mode="area")
            moment, direction = rays.float().split(3, 1)
            position = torch.linalg.cross(direction, moment, dim=1) + along * direction + offset
        parts = [
            position.clamp(-1, 1),
            opacity.sigmoid(),
            _LARGEST_SCALE * F.softplus(scale),
            F.normalize(rotation, dim=1),
            0.5 + 0.5 * colour.tanh(),
        ]
        return torch.cat(parts, 1).view(b, v, 14, -1).transpose(2, 3).reshape(b, -1, 14)


def to_gaussians(splats: Tensor, config: Config = BIG, at_least: int = 0, at_most: int = MAX_GAUSSIANS) -> Gaussians:
    """Of one object's `splats` (N, 14), as `LGM` gives them, those that the config's opacities keep; the most opaque
    `at_most` of them.

    A splat is framed by the box around its Gaussians, so faint ones far from the others would make it small.
    Where there are fewer than `at_least`, faint ones become several at the same place, together as opaque as the one
    was: what is seen stays nearly the same.
    """
    opacity, position = splats[:, 3], splats[:, :3]
    clear = position[opacity >= config.stray_opacity]
    kept = opacity >= config.min_opacity
    if len(clear):
        kept &= ((position >= clear.amin(0)) & (position <= clear.amax(0))).all(1)
    splats = splats[kept]
    if len(splats) > at_most:
        splats = splats[splats[:, 3].topk(at_most).indices]
    if 0 < len(splats) < at_least:
        faint = splats[:, 3] < _FAINT
        if not faint.any():
            faint = torch.ones_like(faint)
        copies = 1 + -(-(at_least - len(splats)) // int(faint.sum()))
        several = splats[faint].repeat(copies, 1)
        several[:, 3] = 1 - (1 - several[:, 3]) ** (1 / copies)
        splats = torch.cat([splats[~faint], several])
    position, opacity, scale, rotation, colour = splats.split([3, 1, 3, 4, 3], 1)
    return Gaussians(
        means=position.contiguous(),
        quats=rotation.contiguous(),
        log_scales=(scale + 1e-8).log(),
        logit_opacities=opacity[:, 0].clamp(1e-6, 1 - 1e-6).logit(),
        sh=((colour - 0.5) / SH_C0)[:, None],
    )
