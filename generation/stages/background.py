"""Background removal with RMBG-2.0 / BiRefNet (Zheng et al., 2024, arXiv:2401.03407), and recentring of the cut-out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from generation.schema.options import BackgroundModel
from generation.weights import WeightsError

# ImageNet statistics, which the nets' backbone was trained with.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

#: alpha above which a pixel counts as part of the object, and the least share of the image that an object covers
_OPAQUE = 0.5
_MIN_SHARE = 0.001


#: Pixels that go through the net at once: two pictures of 1024 pixels a side, which take 2.3 GiB of activations in 16
#: bits. A small GPU is busy with one; on an H200 one takes 0.07 s, and four, two by two, 0.18 to 0.29.
_AT_ONCE = 2 * 1024**2


class NothingInImage(Exception):
    """There is no object in the picture."""


class BackgroundRemover:
    """A loaded matting net."""

    def __init__(self, net: torch.nn.Module, image_size: int) -> None:
        self._net = net
        self._size = image_size

    @classmethod
    def load(cls, folder: Path, options: BackgroundModel, device: str) -> BackgroundRemover:
        """Load a folder with ``config.json`` (its ``auto_map`` names a modelling file beside it) and safetensors.

        ``AutoModelForImageSegmentation.from_pretrained`` can not do it since transformers 5: it builds on the meta
        device, where the published modelling code asks tensors for their values, and expects what its classes never
        set up. So the class is fetched and built here, in real memory.
        Raises WeightsError when the folder is incomplete or the weights are not exactly those of the class.
        """
        try:
            auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
            config_class: Any = get_class_from_dynamic_module(auto_map["AutoConfig"], folder, local_files_only=True)
            net_class = get_class_from_dynamic_module(
                auto_map["AutoModelForImageSegmentation"], folder, local_files_only=True
            )
            net = net_class(config=config_class.from_pretrained(folder))
            net.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{folder}: not a usable background-removal model: {error}") from error
        net.requires_grad_(False)
        return cls(net.to(device, getattr(torch, options.dtype)).eval(), options.image_size)

    def warm_up(self, count: int) -> None:
        """Run once on ``count`` random pictures."""
        self.remove(torch.rand(count, 3, self._size, self._size))

    @torch.no_grad()
    def remove(self, images: torch.Tensor) -> torch.Tensor:
        """Alpha (B, 1, H, W) in 0..1, float32, of images (B, 3, H, W) in 0..1."""
        return torch.cat([self._remove(some) for some in images.split(max(1, _AT_ONCE // self._size**2))])

    def _remove(self, images: torch.Tensor) -> torch.Tensor:
        parameter = next(self._net.parameters())
        x = F.interpolate(
            images.to(parameter.device, torch.float32),
            size=(self._size, self._size),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        x = (x - _MEAN.to(x)) / _STD.to(x)
        with default_dtype(parameter.dtype):
            logits = self._net(x.to(parameter.dtype))[-1]  # from coarse to fine; the last is the finest
        alpha = F.interpolate(
            logits.float().sigmoid(), size=images.shape[-2:], mode="bilinear", align_corners=False, antialias=True
        )
        return alpha.clamp(0, 1).to(images.device)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The published code makes its attention masks in the default type, which must be that of the weights then.

    Autocast would do, too, but computes the deformable convolutions in float32, in twice the memory.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def recentre(
    image: torch.Tensor, alpha: torch.Tensor, size: int, border_ratio: float = 0.2, given: bool = False
) -> torch.Tensor:
    """The cut-out (4, size, size), RGBA in 0..1, as DreamGaussian expects its reference view.

    The object's bounding box is cut from ``image`` (3, H, W) and ``alpha`` (1, H, W), its longer side scaled to
    ``size * (1 - border_ratio)`` pixels, and put into the middle of a transparent square.
    With ``given``, ``alpha`` came with the picture: then a small or half-transparent object counts, too.
    Raises NothingInImage when nothing of ``alpha`` is opaque, or less than a thousandth where it is not given, and
    ValueError when the reason is that picture or mask are not finite.
    """
    rows, columns = torch.nonzero(alpha[0] > (alpha.max() / 2 if given else _OPAQUE), as_tuple=True)
    if len(rows) < (1 if given else max(1, _MIN_SHARE * alpha.numel())):
        for name, values in (("picture", image), ("mask", alpha)):
            if not values.isfinite().all():
                raise ValueError(f"the {name} is not finite: its model's weights are damaged, or overflow in 16 bits")
        raise NothingInImage(
            "all of the image is transparent" if given else "the background remover found no object in the image"
        )
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(columns.min()), int(columns.max()) + 1
    # Premultiplied while it is resized, so that background colour does not bleed into the edge.
    crop = torch.cat([image * alpha, alpha])[:, top:bottom, left:right]
    scale = size * (1 - border_ratio) / max(crop.shape[1:])
    height, width = (max(1, round(side * scale)) for side in crop.shape[1:])
    crop = F.interpolate(crop[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True)[0]
    colour, coverage = crop[:3], crop[3:]
    colour = torch.where(coverage > 1e-3, colour / coverage.clamp_min(1e-3), colour)
    cutout = torch.zeros(4, size, size, dtype=crop.dtype, device=crop.device)
    y, x = (size - height) // 2, (size - width) // 2
    cutout[:, y : y + height, x : x + width] = torch.cat([colour, coverage]).clamp(0, 1)
    return cutout
