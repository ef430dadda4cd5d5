"""BiRefNet, by the modelling file that RMBG-2.0 is published with."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from generation.schema.options import BackgroundModel
from generation.stages.background import BackgroundRemover
from scripts.tools.fidelity.comparison import Comparison, borrowed
from scripts.tools.golden_weights import weights


@torch.no_grad()
def birefnet(comparison: Comparison) -> None:
    """The published modelling file through our loader, against the authors' repository, with the smallest Swin."""
    image = weights({"x": [1, 3, 256, 256]}, seed=6)["x"].sigmoid()
    with (
        tempfile.TemporaryDirectory() as name,
        borrowed(comparison.authors / "BiRefNet", "cv2", "dataset", "utils"),
    ):
        config = importlib.import_module("config").Config
        original = config.__init__

        def smaller(self: object) -> None:
            original(self)
            self.bb, self.SDPA_enabled = "swin_v1_t", False  # type: ignore[attr-defined]
            self.lateral_channels_in_collection = [1536, 768, 384, 192]  # type: ignore[attr-defined]
            self.cxt = [192, 384, 768]  # type: ignore[attr-defined]

        with patch.object(config, "__init__", smaller):
            theirs = importlib.import_module("models.birefnet").BiRefNet(bb_pretrained=False).eval()
        state = theirs.state_dict()
        filled = weights({k: list(v.shape) for k, v in state.items() if v.is_floating_point()}, seed=7)
        filled |= {k: v.abs() + 0.5 for k, v in filled.items() if k.endswith("running_var")}
        theirs.load_state_dict(state | filled)
        folder = _published(comparison, Path(name), theirs.state_dict())
        ours = BackgroundRemover.load(folder, BackgroundModel(model="./", image_size=256), "cpu")
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        out = theirs((image - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))[-1].sigmoid()
    comparison.add("BiRefNet, alpha of 256 x 256 pixels", out, ours.remove(image))


def _published(comparison: Comparison, folder: Path, state: dict[str, Tensor]) -> Path:
    """A folder as on the hub: the modelling files, made smaller by one number, and weights."""
    source = comparison.authors / "RMBG-2.0"
    shutil.copy(source / "BiRefNet_config.py", folder)
    code = (source / "birefnet.py").read_text(encoding="utf-8")
    assert code.count("][6]\n") == 1  # the backbone's place in a list
    (folder / "birefnet.py").write_text(code.replace("][6]\n", "][3]\n"), encoding="utf-8")
    auto_map = {
        "AutoConfig": "BiRefNet_config.BiRefNetConfig",
        "AutoModelForImageSegmentation": "birefnet.BiRefNet",
    }
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map, "bb_pretrained": False}))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    return folder
