"""TRELLIS's networks, sampler and PLY, and DINOv2.

A network is run a second time with a trunk a thousandth as large ("quiet"). That shows the epsilon of its norms.
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from plyfile import PlyData
from torch import Tensor, nn

from generation.generators.trellis.condition import Condition
from generation.generators.trellis.gaussian_decoder import GaussianDecoder, RawGaussians, perturbation
from generation.generators.trellis.layers import position_embedding
from generation.generators.trellis.slat_flow import SlatFlow
from generation.generators.trellis.sparse import Voxels
from generation.generators.trellis.splats import to_gaussians
from generation.generators.trellis.structure_decoder import StructureDecoder
from generation.generators.trellis.structure_flow import StructureFlow
from generation.generators.trellis.weights import build
from scripts.tools.fidelity.comparison import Comparison, borrowed, shapes
from scripts.tools.fidelity.small_trellis import (
    GAUSSIAN_DECODER,
    INTERVAL,
    NORMALISATION,
    PARTS,
    RESCALE,
    SAMPLED,
    SEED,
    SLAT_FLOW,
    STRUCTURE_DECODER,
    STRUCTURE_FLOW,
    WHOLE,
    cutouts,
    decoded_cells,
    dinov2_folder,
    dinov2_names,
    ours,
    ply_fields,
    quiet,
    sample,
    sparse_coords,
    sparse_structure,
    to_dinov2,
    whole_run,
)
from scripts.tools.fidelity.trellis_stand_ins import authors, matrices
from scripts.tools.golden_weights import weights

#: what the published files' configs say, as the authors' repository has them in configs/
FULL = {
    "generation/ss_flow_img_dit_L_16l8_fp16.json": ("denoiser", StructureFlow, "SparseStructureFlowModel"),
    "vae/ss_vae_conv3d_16l8_fp16.json": ("decoder", StructureDecoder, "SparseStructureDecoder"),
    "generation/slat_flow_img_dit_L_64l8p2_fp16.json": ("denoiser", SlatFlow, "SLatFlowModel"),
    "vae/slat_vae_enc_dec_gs_swin8_B_64l8_fp16.json": ("decoder", GaussianDecoder, "SLatGaussianDecoder"),
}


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
        mine = ply_fields(to_gaussians(ours))
        for name, their in _upright(theirs, path).items():
            self.comparison.add(f"TRELLIS's PLY turned upright, {name}", their, mine[name])

    @torch.no_grad()
    def whole(self) -> None:
        """Their pipeline from a picture's features to its PLY, from their own noise."""
        features = weights({"features": [1, 7, 24]}, seed=7)["features"] * 13
        states = {}
        with authors(self.folder) as get, tempfile.TemporaryDirectory() as folder:
            kinds = {
                "sparse_structure_flow_model": get("trellis.models.sparse_structure_flow").SparseStructureFlowModel,
                "sparse_structure_decoder": get("trellis.models.sparse_structure_vae").SparseStructureDecoder,
                "slat_flow_model": get("trellis.models.structured_latent_flow").SLatFlowModel,
                "slat_decoder_gs": get("trellis.models.structured_latent_vae.decoder_gs").SLatGaussianDecoder,
            }
            sampler = get("trellis.pipelines.samplers.flow_euler").FlowEulerGuidanceIntervalSampler
            kind = get("trellis.pipelines.trellis_image_to_3d").TrellisImageTo3DPipeline
            with patch.object(kind, "_init_image_cond_model", lambda self, name: None):
                models = {name: kinds[name](**config) for name, (_, config, _) in PARTS.items()}
                pipeline = kind(models, sampler(1e-5), sampler(1e-5), NORMALISATION)
            for name, model in models.items():
                states[name] = weights(shapes(model))
                if name == "sparse_structure_decoder":
                    states[name] = sparse_structure(states[name])
                model.load_state_dict(states[name])
                model.eval()
            condition = {"cond": features, "neg_cond": torch.zeros_like(features)}
            torch.manual_seed(SEED)
            cells = pipeline.sample_sparse_structure(condition, 1, _parameters("structure"))
            latents = pipeline.sample_slat(condition, cells, _parameters("slat"))
            theirs = pipeline.decode_slat(latents, ["gaussian"])["gaussian"][0]
            golden = _upright(theirs, Path(folder) / "their.ply")
        mine = ply_fields(whole_run(states, features))
        for name, their in golden.items():
            self.comparison.add(f"TRELLIS, whole: {name} of {len(their)} Gaussians", their, mine[name])
        self.comparison.golden("trellis_whole", {"features": features, **golden})

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
                self.comparison.count(what, differing, float(sum(map(math.prod, theirs.values()))))


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


def _parameters(flow: str) -> dict[str, Any]:
    """``WHOLE`` under the names of the authors' sampler."""
    names = {"steps": "steps", "guidance": "cfg_strength", "interval": "cfg_interval", "rescale": "rescale_t"}
    return {theirs: WHOLE[f"{flow}_{ours}"] for ours, theirs in names.items()}


def _upright(theirs: Any, path: Path) -> dict[str, Tensor]:
    """What the authors' PLY says. It has -y up, ours y up: half a turn around x. Rotations are matrices."""
    theirs.save_ply(str(path))
    table = PlyData.read(path)["vertex"]
    half_turn = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])
    columns = {name: torch.tensor(table[name].copy()) for name in table.data.dtype.names}
    quats = torch.stack([columns[f"rot_{i}"] for i in range(4)], 1)
    return {
        "means": torch.stack([columns[axis] for axis in "xyz"], 1) @ half_turn.T,
        "colours": torch.stack([columns[f"f_dc_{i}"] for i in range(3)], 1),
        "opacities": columns["opacity"],
        "scales": torch.stack([columns[f"scale_{i}"] for i in range(3)], 1),
        "rotations": half_turn @ torch.from_numpy(matrices(quats.numpy())).float(),
    }


def _field(theirs: Any, name: str) -> Tensor:
    """A field of the authors' Gaussian as its renderer gets it."""
    if name == "quats":
        return theirs._rotation + theirs.rots_bias
    if name == "opacities":
        return (theirs._opacity + theirs.opacity_bias)[:, 0]
    return {"means": theirs.get_xyz, "colours": theirs.get_features[:, 0], "scales": theirs.get_scaling}[name]
