"""Run the code of TRELLIS's and DINOv2's authors and ours on the same random weights, and say how far they are apart.

``.venv/bin/python -m scripts.tools.fidelity_trellis AUTHORS [--golden]`` wants a folder with checkouts of the public
repositories that docs/FIDELITY.md lists, under their names. Their code is imported from there and nothing of it is
kept. spconv is stood in for by a dense convolution whose outputs are masked, xformers by PyTorch's own attention. Every
tensor is drawn anew, norms and gammas included: as their code leaves them several outputs are exactly zero.

A network is run a second time with a trunk a thousandth as large ("quiet"), where it shows which epsilon a norm has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from plyfile import PlyData
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from generation.generators.trellis.condition import Condition
from generation.generators.trellis.gaussian_decoder import GaussianDecoder, RawGaussians, perturbation
from generation.generators.trellis.layers import position_embedding
from generation.generators.trellis.sampler import schedule
from generation.generators.trellis.slat_flow import SlatFlow
from generation.generators.trellis.sparse import Voxels
from generation.generators.trellis.splats import to_gaussians
from generation.generators.trellis.structure_decoder import StructureDecoder
from generation.generators.trellis.structure_flow import StructureFlow
from generation.generators.trellis.weights import build, load_network
from scripts.tools.fidelity import LIMIT, Comparison, borrowed, shapes
from scripts.tools.golden_weights import weights

STRUCTURE_FLOW = {
    "resolution": 4, "in_channels": 4, "out_channels": 4, "model_channels": 32, "cond_channels": 24, "num_blocks": 2,
    "num_heads": 4, "mlp_ratio": 4, "patch_size": 1, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": False,
}  # fmt: skip
STRUCTURE_DECODER = {
    "out_channels": 1, "latent_channels": 4, "num_res_blocks": 2, "num_res_blocks_middle": 2, "channels": [32, 16, 8],
    "use_fp16": False,
}  # fmt: skip
SLAT_FLOW = {
    "resolution": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "cond_channels": 24, "num_blocks": 2,
    "num_heads": 4, "mlp_ratio": 4, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [16],
    "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": False,
}  # fmt: skip
GAUSSIANS: dict[str, Any] = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 4, "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4, "scaling_bias": 4e-3, "opacity_bias": 0.1, "scaling_activation": "softplus",
}  # fmt: skip
GAUSSIAN_DECODER: dict[str, Any] = {
    "resolution": 16, "model_channels": 24, "latent_channels": 4, "num_blocks": 3, "num_heads": 3, "mlp_ratio": 4,
    "attn_mode": "swin", "window_size": 8, "use_fp16": False, "representation_config": GAUSSIANS,
}  # fmt: skip
DINOV2 = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
          "num_register_tokens": 4}  # fmt: skip
#: what the published files' configs say, as the authors' repository has them in configs/
FULL = {
    "generation/ss_flow_img_dit_L_16l8_fp16.json": ("denoiser", StructureFlow, "SparseStructureFlowModel"),
    "vae/ss_vae_conv3d_16l8_fp16.json": ("decoder", StructureDecoder, "SparseStructureDecoder"),
    "generation/slat_flow_img_dit_L_64l8p2_fp16.json": ("denoiser", SlatFlow, "SLatFlowModel"),
    "vae/slat_vae_enc_dec_gs_swin8_B_64l8_fp16.json": ("decoder", GaussianDecoder, "SLatGaussianDecoder"),
}
#: what a quiet trunk has a thousandth of
QUIET = {
    "structure_flow": ("input_layer", "pos_emb", "to_out", "mlp.mlp.2"),
    "structure_decoder": ("input_layer", "conv1", "conv2", "blocks.2.conv", "blocks.5.conv"),
    "slat_flow": ("input_layer", "conv1", "conv2", "skip_connection", "to_out", "mlp.mlp.2"),
    "gaussian_decoder": ("input_layer", "to_out", "mlp.mlp.2"),
    "condition": ("embeddings", "layer_scale"),
}
#: steps and guidance of the authors' demonstration and of their pipeline's defaults
SAMPLED = ((12, 7.5), (25, 5.0))
INTERVAL, RESCALE = (0.5, 1.0), 3.0


def quiet(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same weights with a trunk a thousandth as large.

    The Gaussian decoder always adds positions to it: there they are taken away again from the first voxel.
    """
    quieter = {
        key: tensor / 1000 if any(part in key for part in QUIET[name]) else tensor for key, tensor in state.items()
    }
    if name == "gaussian_decoder":
        (position,) = position_embedding(decoded_cells()[0][:1], GAUSSIAN_DECODER["model_channels"])
        quieter["input_layer.bias"] = quieter["input_layer.bias"] - position
    return quieter


def decoded_cells() -> list[Tensor]:
    """What the Gaussian decoder is given."""
    return sparse_coords(5, 16, (0.02, 0.01))


def sparse_coords(seed: int, side: int, shares: tuple[float, ...]) -> list[Tensor]:
    """Voxels (N, 3) of one sample for each share of the cube, in the order of ``argwhere``."""
    numbers = weights({"cells": [len(shares), side, side, side]}, seed)["cells"]
    spread = numbers * float(side) ** 1.5  # standard normal again
    return [
        torch.argwhere(cells > torch.special.ndtri(torch.tensor(1 - share)))
        for cells, share in zip(spread, shares, strict=True)
    ]


# ---- what stands in for packages that the authors' code imports ----


class SparseConvTensor:
    """As much of spconv's as the authors' SparseTensor touches."""

    def __init__(self, features: Tensor, indices: Tensor, spatial_shape: Any, batch_size: int, *more: Any) -> None:
        self._features, self.indices, self.spatial_shape, self.batch_size = features, indices, spatial_shape, batch_size
        self.grid, self.voxel_num, self.indice_dict = (*more, None, None, None)[:3]
        self.benchmark = self.benchmark_record = self.thrust_allocator = self._timer = None
        self.force_algo = self.int8_scale = None

    @property
    def features(self) -> Tensor:
        return self._features


class SubMConv3d(nn.Module):
    """A dense convolution whose outputs are taken where inputs are."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **_: Any) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.zeros(out_channels, *(kernel_size,) * 3, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, data: SparseConvTensor) -> SparseConvTensor:
        sample, x, y, z = data.indices.long().unbind(1)
        side = int(data.indices[:, 1:].max()) + 1
        grid = data.features.new_zeros(data.batch_size, data.features.shape[1], side, side, side)
        grid[sample, :, x, y, z] = data.features
        out = F.conv3d(grid, self.weight.permute(0, 4, 1, 2, 3), self.bias, padding=1)
        return SparseConvTensor(out[sample, :, x, y, z], data.indices, data.spatial_shape, data.batch_size)


class BlockDiagonalMask:
    def __init__(self, rows: list[int], columns: list[int] | None) -> None:
        self.rows, self.columns = rows, columns or rows

    @classmethod
    def from_seqlens(cls, rows: list[int], columns: list[int] | None = None) -> BlockDiagonalMask:
        return cls(rows, columns)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockDiagonalMask | None = None) -> Tensor:
    """(1, tokens, heads, width)."""
    allowed = None
    if mask is not None:
        allowed = torch.block_diag(
            *(torch.ones(r, c) for r, c in zip(mask.rows, mask.columns, strict=True))
        ).bool()  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


def _quaternions(matrices: Any) -> Any:
    return Rotation.from_matrix(matrices).as_quat(scalar_first=True)


def _matrices(quaternions: Any) -> Any:
    return Rotation.from_quat(quaternions, scalar_first=True).as_matrix()


class EasyDict(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


@contextmanager
def authors(folder: Path) -> Iterator[Callable[[str], Any]]:
    """A function that imports a module of TRELLIS's authors, with all that it wants stood in for."""
    stand_ins = ("xformers", "xformers.ops", "spconv", "spconv.pytorch", "easydict", "utils3d", "trellis",
                 "trellis.representations", "trellis.pipelines", "trellis.models.structured_latent_vae")  # fmt: skip
    with (
        borrowed(folder, *stand_ins),
        patch.dict(os.environ, {"ATTN_BACKEND": "sdpa", "SPARSE_ATTN_BACKEND": "xformers"}),
        patch.object(torch.Tensor, "cuda", lambda self: self),
    ):
        operations = SimpleNamespace(
            memory_efficient_attention=attention, fmha=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
        )
        sparse = SimpleNamespace(SparseConvTensor=SparseConvTensor, SubMConv3d=SubMConv3d)
        modules: dict[str, Any] = sys.modules
        modules["xformers"].ops = modules["xformers.ops"] = operations
        modules["spconv"].pytorch = modules["spconv.pytorch"] = sparse
        modules["easydict"].EasyDict = EasyDict
        modules["utils3d"].numpy = MagicMock(quaternion_to_matrix=_matrices, matrix_to_quaternion=_quaternions)
        for name in (name for name in stand_ins if name.startswith("trellis")):
            # Without what their __init__ imports, which is everything.
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = [str(folder / name.replace(".", "/"))]
        gaussian = importlib.import_module("trellis.representations.gaussian.gaussian_model").Gaussian
        gaussian.__init__.__defaults__ = (*gaussian.__init__.__defaults__[:-1], "cpu")
        modules["trellis.representations"].Gaussian = gaussian
        try:
            yield importlib.import_module
        finally:
            for name in [name for name in sys.modules if name.startswith("trellis.")]:
                del sys.modules[name]  # folders without an __init__ say of no file that they are from


def ours(kind: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Our network from the authors' own kind of files."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "network"
        path.with_suffix(".json").write_text(json.dumps({"name": "any", "args": config}))
        save_file(state, path.with_suffix(".safetensors"))
        return load_network(kind, path, "cpu", torch.float32)


class Spreads(Comparison):
    """It also has the standard deviation of what the authors' code gave: of zeros any code gives the same."""

    def __init__(self, authors: Path, write: bool) -> None:
        super().__init__(authors, write)
        self.spreads: dict[str, float] = {}

    def add(self, what: str, theirs: Tensor, ours: Tensor) -> None:
        super().add(what, theirs, ours)
        self.spreads[what] = float(theirs.std())


class Trellis:
    """One method a comparison."""

    def __init__(self, comparison: Comparison) -> None:
        self.folder = comparison.authors / "TRELLIS"
        self.comparison = comparison

    def _pair(self, theirs: nn.Module, kind: Any, config: dict[str, Any], name: str, small: bool) -> tuple[Any, Any]:
        state = weights(shapes(theirs))
        if small:
            state = quiet(state, name)
        theirs.load_state_dict(state)
        return theirs.eval(), ours(kind, config, state)

    def _add(
        self, what: str, name: str, pair: list[tuple[Tensor, Tensor]], tensors: dict[str, Tensor], **about: object
    ) -> None:
        """Their output and ours, with a trunk as drawn and with a quiet one."""
        for more, (theirs, mine) in zip(("", ", its trunk a thousandth as large"), pair, strict=True):
            self.comparison.add(what + more, theirs, mine)
        outputs = {"out": pair[0][0], "quiet": pair[1][0]}
        self.comparison.golden(f"trellis_{name}", {**tensors, **outputs}, **about)

    @torch.no_grad()
    def structure_flow(self) -> None:
        """Two samples at two times with their pictures, and both without one."""
        inputs = weights({"x": [2, 4, 4, 4, 4], "features": [2, 7, 24]}, seed=1)
        x, features, t = inputs["x"] * 16, inputs["features"] * 13, torch.tensor([900.0, 210.0])
        with authors(self.folder) as get:
            kind = get("trellis.models.sparse_structure_flow").SparseStructureFlowModel
            theirs = kind(**STRUCTURE_FLOW)
            pairs: list[tuple[Tensor, Tensor]] = []
            for small in (False, True):
                theirs, flow = self._pair(theirs, StructureFlow, STRUCTURE_FLOW, "structure_flow", small)
                conditional, unconditional = theirs(x, t, features), theirs(x, t, torch.zeros_like(features))
                mine = flow(x, t, [flow.project_context(each) for each in features], guided=2)
                pairs.append((torch.cat([conditional, unconditional]), mine))
            self._add(
                "TRELLIS structure flow, 2 samples with and without a picture", "structure_flow", pairs,
                {"x": x, "t": t, "features": features}, config=STRUCTURE_FLOW, shapes=shapes(theirs),
            )  # fmt: skip

    @torch.no_grad()
    def structure_decoder(self) -> None:
        x = weights({"x": [2, 4, 2, 2, 2]}, seed=2)["x"] * 5.7
        with authors(self.folder) as get:
            theirs = get("trellis.models.sparse_structure_vae").SparseStructureDecoder(**STRUCTURE_DECODER)
            pairs: list[tuple[Tensor, Tensor]] = []
            for small in (False, True):
                theirs, decoder = self._pair(theirs, StructureDecoder, STRUCTURE_DECODER, "structure_decoder", small)
                pairs.append((theirs(x), decoder(x)))
            about = {"config": STRUCTURE_DECODER, "shapes": shapes(theirs)}
            self._add("TRELLIS structure decoder, 2 samples", "structure_decoder", pairs, {"x": x}, **about)

    @torch.no_grad()
    def slat_flow(self) -> None:
        """Two samples of different sizes in one batch, at two times, with their pictures and without."""
        cells = sparse_coords(3, 16, (0.05, 0.02))
        total = sum(map(len, cells))
        inputs = weights({"x": [total, 4], "features": [2, 7, 24]}, seed=4)
        x, features, t = inputs["x"] * 2, inputs["features"] * 13, torch.tensor([900.0, 210.0])
        voxels = [Voxels.of(coords, 16) for coords in cells]
        with authors(self.folder) as get:
            theirs = get("trellis.models.structured_latent_flow").SLatFlowModel(**SLAT_FLOW)
            pairs: list[tuple[Tensor, Tensor]] = []
            for small in (False, True):
                theirs, flow = self._pair(theirs, SlatFlow, SLAT_FLOW, "slat_flow", small)
                sparse = _sparse(get, x, cells)
                conditional, unconditional = (
                    theirs(sparse, t, c).feats for c in (features, torch.zeros_like(features))
                )
                contexts = [flow.project_context(each) for each in features]
                mine = flow(x, t, contexts, Voxels.join(voxels), Voxels.join(voxels + voxels))
                pairs.append((torch.cat([conditional, unconditional]), mine))
            what = f"TRELLIS SLAT flow, {len(cells[0])} and {len(cells[1])} voxels with and without a picture"
            tensors = {"x": x, "t": t, "features": features, "cells_0": cells[0], "cells_1": cells[1]}
            self._add(what, "slat_flow", pairs, tensors, config=SLAT_FLOW, shapes=shapes(theirs))

    @torch.no_grad()
    def gaussian_decoder(self) -> None:
        """Every field of two samples' Gaussians, after activation; and one's PLY."""
        cells = decoded_cells()
        x = weights({"x": [sum(map(len, cells)), 4]}, seed=6)["x"] * 2
        voxels = Voxels.join([Voxels.of(coords, 16) for coords in cells])
        with authors(self.folder) as get, tempfile.TemporaryDirectory() as folder:
            theirs = get("trellis.models.structured_latent_vae.decoder_gs").SLatGaussianDecoder(**GAUSSIAN_DECODER)
            outputs: dict[str, Tensor] = {}
            self.comparison.add(
                "TRELLIS where Gaussians start in a voxel", theirs.offset_perturbation, perturbation(4, 1.5)
            )  # fmt: skip
            for small in (False, True):
                theirs, decoder = self._pair(theirs, GaussianDecoder, GAUSSIAN_DECODER, "gaussian_decoder", small)
                their, our = theirs(_sparse(get, x, cells)), decoder(x, voxels.fine)
                golden: dict[str, Tensor] = {}
                for field in ("means", "colours", "scales", "quats", "opacities"):
                    pair = torch.cat([_field(g, field) for g in their]), torch.cat([getattr(g, field) for g in our])
                    suffix = ", its trunk a thousandth as large" if small else ""
                    self.comparison.add(f"TRELLIS Gaussian decoder, {field}{suffix}", *pair)
                    golden[field] = pair[0]
                outputs |= {"quiet": golden["colours"]} if small else golden
            tensors = {"x": x, "cells_0": cells[0], "cells_1": cells[1], **outputs}
            about = {"config": GAUSSIAN_DECODER, "shapes": shapes(theirs)}
            self.comparison.golden("trellis_gaussian_decoder", tensors, **about)
            self._ply(their[0], our[0], Path(folder) / "their.ply")

    def _ply(self, theirs: Any, ours: RawGaussians, path: Path) -> None:
        """Their file has -y up, ours y up: half a turn around x. Rotations are compared as matrices."""
        theirs.save_ply(str(path))
        table = PlyData.read(path)["vertex"]
        half_turn = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])
        columns = {name: torch.tensor(table[name].copy()) for name in table.data.dtype.names}
        means = torch.stack([columns[axis] for axis in "xyz"], 1) @ half_turn.T
        turned = half_turn @ torch.from_numpy(
            _matrices(torch.stack([columns[f"rot_{i}"] for i in range(4)], 1).numpy())
        ).float()  # fmt: skip
        mine = to_gaussians(ours)
        pairs = {
            "means": (means, mine.means),
            "colours": (torch.stack([columns[f"f_dc_{i}"] for i in range(3)], 1), mine.sh[:, 0]),
            "opacities": (columns["opacity"], mine.logit_opacities),
            "scales": (torch.stack([columns[f"scale_{i}"] for i in range(3)], 1), mine.log_scales),
            "rotations": (turned, mine.rotations()),
        }
        for name, (their, our) in pairs.items():
            self.comparison.add(f"TRELLIS's PLY turned upright, {name}", their, our)

    @torch.no_grad()
    def sampler(self) -> None:
        """Both flows to the last step from the same noise."""
        get_noise = weights({"noise": [1, 4, 4, 4, 4], "features": [1, 7, 24]}, seed=7)
        features = get_noise["features"] * 13
        (cells,) = sparse_coords(8, 16, (0.03,))
        noises = {
            "structure": get_noise["noise"] * 16,
            "slat": weights({"noise": [len(cells), 4]}, seed=9)["noise"] * 2,
        }
        voxels = Voxels.of(cells, 16)
        golden = {"features": features, "cells": cells, **{f"noise_{name}": noise for name, noise in noises.items()}}
        with authors(self.folder) as get:
            sampler = get("trellis.pipelines.samplers.flow_euler").FlowEulerGuidanceIntervalSampler(sigma_min=1e-5)
            parts = {
                "structure": (get("trellis.models.sparse_structure_flow").SparseStructureFlowModel, STRUCTURE_FLOW),
                "slat": (get("trellis.models.structured_latent_flow").SLatFlowModel, SLAT_FLOW),
            }
            for name, (kind, config) in parts.items():
                our_kind = StructureFlow if name == "structure" else SlatFlow
                theirs, flow = self._pair(kind(**config), our_kind, config, "", False)
                for steps, guidance in SAMPLED:
                    noise = noises[name] if name == "structure" else _sparse(get, noises[name], [cells])
                    their = sampler.sample(
                        theirs, noise, cond=features, neg_cond=torch.zeros_like(features), steps=steps,
                        cfg_strength=guidance, cfg_interval=INTERVAL, rescale_t=RESCALE, verbose=False,
                    ).samples  # fmt: skip
                    their = their if name == "structure" else their.feats
                    mine = sample(
                        flow, noises[name], features, steps, guidance, None if name == "structure" else voxels
                    )
                    self.comparison.add(f"TRELLIS sampler, {name}, {steps} steps at guidance {guidance}", their, mine)
                    golden[f"{name}_{steps}"] = their
        self.comparison.golden("trellis_sampler", golden)

    def positions(self) -> None:
        cells = torch.cartesian_prod(*[torch.tensor([0, 1, 7, 63])] * 3)
        with authors(self.folder) as get:
            theirs = get("trellis.modules.transformer").AbsolutePositionEmbedder(1024)(cells)
        self.comparison.add("TRELLIS position embedding, 1024 channels", theirs, position_embedding(cells, 1024))

    @torch.no_grad()
    def condition(self) -> None:
        """DINOv2's own code from its own layout; ours from the hub's, which the public weights of it have."""
        picture = cutouts()
        logging = importlib.import_module("logging")
        with borrowed(self.comparison.authors / "dinov2"):
            logging.getLogger("dinov2").setLevel(logging.ERROR)
            kind = importlib.import_module("dinov2.models.vision_transformer").DinoVisionTransformer
            attended = importlib.import_module("dinov2.layers.attention").MemEffAttention
            block = importlib.import_module("dinov2.layers.block").Block
            theirs = kind(
                img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=4, mlp_ratio=4, init_values=1.0,
                block_chunks=0, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0,
                block_fn=lambda **options: block(**options, attn_class=attended),
            ).eval()  # fmt: skip
            pixels = picture[:, :3] * picture[:, 3:]
            mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            pairs: list[tuple[Tensor, Tensor]] = []
            for small in (False, True):
                state = weights(dinov2_names())
                state = quiet(state, "condition") if small else state
                theirs.load_state_dict(to_dinov2(state), strict=True)
                their = theirs(pixels, is_training=True)["x_prenorm"]
                their = F.layer_norm(their, their.shape[-1:])
                with tempfile.TemporaryDirectory() as name:
                    dinov2_folder(Path(name), state)
                    mine = Condition.load(Path(name), "cpu", torch.float32)(picture)
                pairs.append((their, mine))
            self._add("DINOv2 with registers, normalised, 2 cut-outs", "condition", pairs, {})

    def names(self) -> None:
        """At full size: is every tensor of the authors' networks in ours, of the same shape, and none besides?"""
        with authors(self.folder) as get:
            modules = {
                "SparseStructureFlowModel": "sparse_structure_flow", "SparseStructureDecoder": "sparse_structure_vae",
                "SLatFlowModel": "structured_latent_flow",
                "SLatGaussianDecoder": "structured_latent_vae.decoder_gs",
            }  # fmt: skip
            for path, (part, kind, name) in FULL.items():
                config = json.loads((self.folder / "configs" / path).read_text())["models"][part]["args"]
                theirs_kind = getattr(get(f"trellis.models.{modules[name]}"), name)
                with torch.device("meta"):
                    mine = shapes(build(kind, config))
                theirs = _shapes_only(theirs_kind, config)
                differing = sum(theirs.get(key) != mine.get(key) for key in theirs.keys() | mine.keys())
                what = f"TRELLIS {name} at full size, {len(theirs)} tensors: names or shapes that differ"
                self.comparison.rows.append((what, float(differing), float(sum(map(math.prod, theirs.values())))))


def _shapes_only(kind: Any, config: dict[str, Any]) -> dict[str, list[int]]:
    """Of the authors' network at full size, without memory for its weights."""
    with (
        torch.device("meta"),
        patch.object(kind, "device", torch.device("meta")),
        patch.object(kind, "initialize_weights", lambda self: None, create=True),
    ):
        return shapes(kind(**{**config, "use_fp16": False}))


def _sparse(get: Callable[[str], Any], features: Tensor, cells: list[Tensor]) -> Any:
    """The authors' sparse tensor."""
    coords = torch.cat([F.pad(each, (1, 0), value=number) for number, each in enumerate(cells)]).int()
    return get("trellis.modules.sparse").SparseTensor(features, coords)


def _field(theirs: Any, name: str) -> Tensor:
    """A field of the authors' Gaussian as its renderer gets it."""
    if name == "quats":
        return theirs._rotation + theirs.rots_bias
    if name == "opacities":
        return (theirs._opacity + theirs.opacity_bias)[:, 0]
    return {"means": theirs.get_xyz, "colours": theirs.get_features[:, 0], "scales": theirs.get_scaling}[name]


def sample(
    flow: Any, noise: Tensor, features: Tensor, steps: int, guidance: float, voxels: Voxels | None = None
) -> Tensor:  # fmt: skip
    """A flow from noise to its end for one picture's features (1, S, C)."""
    context, x = flow.project_context(features[0]), noise
    for step in schedule(steps, RESCALE, INTERVAL):
        t = torch.tensor([1000 * step.t])
        if voxels is None:
            v = flow(x, t, [context], guided=int(step.guided))
        else:
            v = flow(x, t, [context], voxels, Voxels.join([voxels] * (1 + step.guided)))
        conditional, unconditional = v.chunk(2) if step.guided else (v, None)
        x = step.apply(x, conditional, unconditional, guidance)
    return x


def cutouts() -> Tensor:
    """(2, 4, 56, 56) in 0..1, of no meaning."""
    return weights({"picture": [2, 4, 56, 56]}, seed=10)["picture"].mul(100).sigmoid()


def dinov2_names() -> dict[str, list[int]]:
    """Names and shapes of a small DINOv2 with registers in the hub's layout, as the public file has them."""
    width, side = 32, 4
    names = {
        "embeddings.cls_token": [1, 1, width], "embeddings.mask_token": [1, width],
        "embeddings.register_tokens": [1, 4, width], "embeddings.position_embeddings": [1, side * side + 1, width],
        "embeddings.patch_embeddings.projection.weight": [width, 3, 14, 14],
        "embeddings.patch_embeddings.projection.bias": [width], "layernorm.weight": [width], "layernorm.bias": [width],
    }  # fmt: skip
    for i in range(2):
        block = f"encoder.layer.{i}."
        for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value",
                     "attention.output.dense"):  # fmt: skip
            names |= {f"{block}{part}.weight": [width, width], f"{block}{part}.bias": [width]}
        for part in ("norm1", "norm2"):
            names |= {f"{block}{part}.weight": [width], f"{block}{part}.bias": [width]}
        names |= {f"{block}layer_scale{n}.lambda1": [width] for n in (1, 2)}
        names |= {f"{block}mlp.fc1.weight": [4 * width, width], f"{block}mlp.fc1.bias": [4 * width]}
        names |= {f"{block}mlp.fc2.weight": [width, 4 * width], f"{block}mlp.fc2.bias": [width]}
    return names


def to_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hub's names to those of DINOv2's authors."""
    words = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.position_embeddings": "pos_embed",
        "embeddings.": "", "encoder.layer.": "blocks.", "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "layernorm.": "norm.",
    }  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for old, new in words.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    for name in [name for name in renamed if "attention.attention.query" in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return renamed


def dinov2_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    """A checkpoint in the hub's layout."""
    config = {**DINOV2, "model_type": "dinov2_with_registers", "architectures": ["Dinov2WithRegistersModel"]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("authors", type=Path, help="folder with the checkouts")
    parser.add_argument("--golden", action="store_true", help="write tests/golden anew")
    arguments = parser.parse_args()
    comparison = Spreads(arguments.authors.resolve(), arguments.golden)
    trellis = Trellis(comparison)
    for check in (trellis.condition, trellis.structure_flow, trellis.structure_decoder, trellis.slat_flow,
                  trellis.gaussian_decoder, trellis.sampler, trellis.positions, trellis.names):  # fmt: skip
        check()
    print("| what | largest difference | largest value | spread |\n|---|---|---|---|")
    for what, difference, largest in comparison.rows:
        spread = f"{comparison.spreads[what]:.3g}" if what in comparison.spreads else ""
        print(f"| {what} | {difference:.1e} | {largest:.3g} | {spread} |")
    worst = max(difference for _, difference, _ in comparison.rows)
    print(f"\nlimit {LIMIT:.0e}: {'all within it' if worst < LIMIT else 'NOT within it'}")
    return 0 if worst < LIMIT and math.isfinite(worst) else 1


if __name__ == "__main__":
    sys.exit(main())
