"""LGM's network, rays and PLY."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from generation.generators.lgm.network import BIG, LGM, Config, plucker_rays, to_gaussians
from generation.splats import ply
from generation.splats.cameras import orbit
from scripts.tools.fidelity.comparison import Comparison, borrowed, shapes
from scripts.tools.golden_weights import lgm_views, lgm_weights

# LGM with a level less, and narrow; groups and heads are fixed in the authors' code.
LGM_SMALL = Config(
    down_channels=(32, 32, 64, 64), down_attention=(False, False, True, True),
    up_channels=(64, 64, 32), up_attention=(True, True, False), input_size=32,
)  # fmt: skip

LGM_PARTS = {
    "positions": slice(0, 3), "opacities": slice(3, 4), "scales": slice(4, 7), "rotations": slice(7, 11),
    "colours": slice(11, 14),
}  # fmt: skip

LGM_UNUSED = ("tyro", "roma", "cv2", "lazy_loader", "diff_gaussian_rasterization", "kiui.lpips")


@contextmanager
def _lgm_code(comparison: Comparison) -> Iterator[ModuleType]:
    with borrowed(comparison.authors / "LGM", *LGM_UNUSED), borrowed(comparison.authors / "kiui"):
        sys.modules["lazy_loader"].attach.return_value = (None, list, [])
        models = importlib.import_module("core.models")
        with patch.object(models, "GaussianRenderer", MagicMock()):  # its constructor wants a GPU
            yield models


@torch.no_grad()
def lgm(comparison: Comparison) -> None:
    """Two objects of four views, at a size that is not the network's; then one of them as the authors' PLY."""
    c = LGM_SMALL
    options = SimpleNamespace(
        input_size=c.input_size, splat_size=c.splat_size, fovy=c.fovy, cam_radius=c.radius, lambda_lpips=0.0,
        down_channels=c.down_channels, down_attention=c.down_attention, mid_attention=True,
        up_channels=c.up_channels, up_attention=c.up_attention,
    )  # fmt: skip
    images = lgm_views()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with _lgm_code(comparison) as models, tempfile.TemporaryDirectory() as name:
        theirs = models.LGM(options).eval()
        state = lgm_weights(shapes(theirs))
        theirs.load_state_dict(state)
        rays = theirs.prepare_default_rays("cpu")
        raised = theirs.prepare_default_rays("cpu", elevation=-20)
        options_of_big = importlib.import_module("core.options").config_defaults["big"]
        published = models.LGM.prepare_default_rays(SimpleNamespace(opt=options_of_big), "cpu")
        size = (c.input_size, c.input_size)
        resized = F.interpolate(images.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
        resized = (resized - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        given = torch.cat([resized.view(2, 4, 3, *size), rays.expand(2, -1, -1, -1, -1)], 2)
        splats = theirs.forward_gaussians(given)
        maps = theirs.unet(given.flatten(0, 1))
        renderer = importlib.import_module("core.gs").GaussianRenderer
        path = Path(name) / "splats.ply"
        renderer.save_ply(object.__new__(renderer), splats[:1], str(path))
        saved = ply.read(path.read_bytes())
        renderer.save_ply(object.__new__(renderer), splats[:1, ::8], str(path))
        some = ply.read(path.read_bytes()).tensors()
        folder = Path(name)
        save_file(state, folder / "model_fp16_fixrot.safetensors")
        (folder / "config.json").write_text(json.dumps(vars(c)))
        ours = LGM.load(folder, "cpu", torch.float32)
    comparison.add("LGM: Plücker rays of its four cameras", rays, ours.rays())
    above = orbit(20.0, torch.tensor([0.0, 90, 180, 270]), c.radius, c.fovy, 32, 32).camera_to_world
    comparison.add("the same, 20 degrees above the object", raised, plucker_rays(above, 32, c.fovy))
    of_big = plucker_rays(BIG.cameras().camera_to_world, BIG.input_size, BIG.fovy)
    comparison.add("LGM big: Plücker rays, by the authors' own options", published, of_big)
    our_maps = ours.unet(given.flatten(0, 1), 4)
    comparison.add("LGM's UNet, 2 objects of 4 views (3DTopia/LGM)", maps, our_maps)
    ours_splats = ours(images, ours.rays())
    for part, columns in LGM_PARTS.items():
        spread = float(splats[..., columns].std())
        what = f"LGM: {part} of {splats.shape[1]} Gaussians (their standard deviation: {spread:.2g})"
        comparison.add(what, splats[..., columns], ours_splats[..., columns])
    # Of the same splats: logits multiply what rounding does to opacities near 0 or 1 by up to a million.
    mine = to_gaussians(splats[0])
    for field, value in saved.tensors().items():
        what = f"LGM's PLY of the same {splats.shape[1]} Gaussians: {field} of {len(saved)}"
        comparison.add(what, value, mine.tensors()[field])
    tensors = {"rays": rays[:, :, ::8, ::8], "raised": raised[:, :, ::8, ::8], "splats": splats[:, ::8]}
    tensors |= {"big_rays": published[:, :, ::32, ::32], **{f"ply_{field}": value for field, value in some.items()}}
    comparison.golden("lgm", tensors, config=vars(c), shapes=shapes(theirs))


def lgm_names(comparison: Comparison) -> None:
    """At full size, as for MVDream."""
    with _lgm_code(comparison) as models, torch.device("meta"):
        big = importlib.import_module("core.options").config_defaults["big"]
        big.lambda_lpips = 0.0
        theirs = models.LGM(big).state_dict()
        ours = LGM(BIG).state_dict()
    differing = {k: v.shape for k, v in theirs.items()}.items() ^ {k: v.shape for k, v in ours.items()}.items()
    count = sum(t.numel() for t in theirs.values())
    what = f"LGM big at full size, {len(theirs)} tensors, {count:,} numbers: names or shapes that differ"
    comparison.count(what, len(differing), float(count))
