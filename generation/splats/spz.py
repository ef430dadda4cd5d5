"""Decoder of the subnet's packed splats (.spz version 2 in one zstd frame), for scoring what a miner submits.

A 16 byte header, then for all N points positions, alphas, colours, scales, rotations and spherical harmonics, one
attribute after the other, each quantised to bytes.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from generation.splats.gaussians import SH_COEFFICIENTS, Gaussians

MAGIC = 0x5053474E
VERSION = 2
_HEADER = struct.Struct("<IIIBBBB")  # magic, version, N, degree of harmonics, fractional bits, flags, reserved
_WIDTHS = (9, 1, 3, 3, 3)  # bytes a point: position, alpha, colour, scale, rotation
_MAX_WINDOW = 1 << 27  # memory that a frame may demand of the decompressor, in bytes


def decode(data: bytes, max_gaussians: int = 2_000_000) -> Gaussians:
    """Unpack a compressed .spz. Raises ValueError naming what is wrong with ``data``.

    What the frame says about its own size is never trusted: N is checked first, and no more than N points are read.
    """
    with _open(data) as reader:
        header = _read(reader, _HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError(f"spz: {len(header)} bytes, shorter than the header of {_HEADER.size}")
        magic, version, n, degree, fractional_bits, _flags, _reserved = _HEADER.unpack(header)
        if magic != MAGIC:
            raise ValueError(f"spz: magic is {magic:#010x}, expected {MAGIC:#010x}")
        if version != VERSION:
            raise ValueError(f"spz: version is {version}, expected {VERSION}")
        if n > max_gaussians:
            raise ValueError(f"spz: claims {n} points, at most {max_gaussians} are accepted")
        if degree >= len(SH_COEFFICIENTS):
            raise ValueError(f"spz: degree of harmonics is {degree}, at most {len(SH_COEFFICIENTS) - 1} is known")
        if fractional_bits > 23:
            raise ValueError(f"spz: {fractional_bits} fractional bits, at most 23 fit into a position")
        widths = (*_WIDTHS, 3 * (SH_COEFFICIENTS[degree] - 1))
        body = _read(reader, n * sum(widths) + 1)
    if len(body) != n * sum(widths):
        found = "more" if len(body) > n * sum(widths) else len(body)
        raise ValueError(f"spz: {found} bytes after the header, expected {n * sum(widths)} for {n} points")

    ends = np.cumsum([n * width for width in widths])
    flat = np.split(np.frombuffer(body, np.uint8), ends[:-1])
    sections = [section.reshape(n, width) for section, width in zip(flat, widths, strict=True)]
    positions, alphas, colours, scales, rotations, harmonics = sections

    low, middle, high = (positions.reshape(n, 3, 3)[:, :, i].astype(np.int32) for i in range(3))
    fixed = low | (middle << 8) | (((high ^ 0x80) - 0x80) << 16)  # the high byte carries the sign
    xyz = rotations / 127.5 - 1.0
    w = np.sqrt(np.maximum(0.0, 1.0 - np.square(xyz).sum(axis=1, keepdims=True)))
    # Bytes 0 and 255 stand for whatever rounds to them; infinite logits would not pass the check for finite values.
    opacity = np.clip(alphas[:, 0] / 255.0, 1e-6, 1.0 - 1e-6)
    dc = _tensor((colours / 255.0 - 0.5) / 0.15).reshape(n, 1, 3)
    rest = _tensor(harmonics / 128.0 - 1.0).reshape(n, SH_COEFFICIENTS[degree] - 1, 3)
    return Gaussians(
        means=_tensor(fixed * 2.0**-fractional_bits),
        quats=_tensor(np.concatenate([w, xyz], axis=1)),
        log_scales=_tensor(scales / 16.0 - 10.0),
        logit_opacities=_tensor(np.log(opacity) - np.log1p(-opacity)),
        sh=torch.cat([dc, rest], dim=1),
    )


def unzstd(data: bytes, limit: int) -> bytes:
    """Decompress one zstd frame. Raises ValueError when it is broken or holds more than ``limit`` bytes."""
    with _open(data) as reader:
        content = _read(reader, limit + 1)
    if len(content) > limit:
        raise ValueError(f"zstd: more than {limit} bytes when decompressed")
    return content


def _open(data: bytes) -> zstandard.ZstdDecompressionReader:
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(data)


def _read(reader: zstandard.ZstdDecompressionReader, size: int) -> bytes:
    """Up to ``size`` bytes, fewer only at the frame's end."""
    parts: list[bytes] = []
    try:
        while size > 0 and (part := reader.read(min(size, 1 << 20))):
            parts.append(part)
            size -= len(part)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: {error}") from error
    return b"".join(parts)


def _tensor(values: NDArray[np.floating]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
