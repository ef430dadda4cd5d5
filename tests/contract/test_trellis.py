"""TRELLIS's and DINOv2's authors' code computed what lies in tests/golden (scripts/tools/fidelity/trellis.py); ours
must agree without it, and every mistake that is easily made must show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from generation.generators.trellis import (
    gaussian_decoder,
    generator,
    layers,
    sampler,
    slat_flow,
    sparse,
    structure_decoder,
)
from generation.generators.trellis import structure_flow as structure_flow_module
from generation.generators.trellis.condition import Condition
from generation.generators.trellis.gaussian_decoder import GaussianDecoder
from generation.generators.trellis.generator import Trellis
from generation.generators.trellis.sampler import Step, schedule
from generation.generators.trellis.slat_flow import SlatFlow
from generation.generators.trellis.sparse import SubmanifoldConv, Voxels
from generation.generators.trellis.structure_decoder import StructureDecoder
from generation.generators.trellis.structure_flow import StructureFlow
from generation.generators.trellis.weights import Networks, build, prepare
from generation.weights import WeightsError
from generation.weights.registry import REGISTRY, wanted
from scripts.bench.trellis_sizes import PUBLISHED
from scripts.tools.fidelity import small_trellis as tool
from scripts.tools.golden_weights import golden, weights

LIMIT = 1e-4
#: a mistake must be ten times as far off
CLEAR = 1e-3


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def network(name: str, kind, small: bool):
    tensors, about = golden(f"trellis_{name}")
    state = weights(about["shapes"])
    return tensors, tool.ours(kind, about["config"], tool.quiet(state, name) if small else state)


@torch.no_grad()
def structure_flow(small: bool = False) -> float:
    tensors, flow = network("structure_flow", StructureFlow, small)
    x, t, features = (tensors[key] for key in ("x", "t", "features"))
    out = flow(x, t, [flow.project_context(each) for each in features], guided=2)
    return apart(out, tensors["quiet" if small else "out"])


@torch.no_grad()
def decoded_structure(small: bool = False) -> float:
    tensors, decoder = network("structure_decoder", StructureDecoder, small)
    return apart(decoder(tensors["x"]), tensors["quiet" if small else "out"])


def cells(tensors: dict[str, Tensor]) -> list[Voxels]:
    return [Voxels.of(tensors[f"cells_{i}"].long(), 16) for i in range(2)]


@torch.no_grad()
def slat(small: bool = False) -> float:
    tensors, flow = network("slat_flow", SlatFlow, small)
    x, t, features = (tensors[key] for key in ("x", "t", "features"))
    voxels = cells(tensors)
    contexts = [flow.project_context(each) for each in features]
    out = flow(x, t, contexts, Voxels.join(voxels), Voxels.join(voxels + voxels))
    return apart(out, tensors["quiet" if small else "out"])


@torch.no_grad()
def gaussians(small: bool = False) -> dict[str, float]:
    tensors, decoder = network("gaussian_decoder", GaussianDecoder, small)
    out = decoder(tensors["x"], Voxels.join(cells(tensors)).fine)
    fields = {field: torch.cat([getattr(each, field) for each in out]) for field in vars(out[0])}
    if small:
        return {"colours": apart(fields["colours"], tensors["quiet"])}
    return {field: apart(value, tensors[field]) for field, value in fields.items()}


def worst_field(small: bool = False) -> float:
    return max(gaussians(small).values())


@torch.no_grad()
def condition(folder: Path, small: bool = False) -> float:
    state = weights(tool.dinov2_names())
    tool.dinov2_folder(folder / "dinov2", tool.quiet(state, "condition") if small else state)
    tensors, _ = golden("trellis_condition")
    return apart(
        Condition.load(folder / "dinov2", "cpu", torch.float32)(tool.cutouts()), tensors["quiet" if small else "out"]
    )


@torch.no_grad()
def sampled(name: str, steps: int, guidance: float) -> float:
    tensors, _ = golden("trellis_sampler")
    kind, golden_name = (StructureFlow, "structure_flow") if name == "structure" else (SlatFlow, "slat_flow")
    _, flow = network(golden_name, kind, False)
    voxels = Voxels.of(tensors["cells"].long(), 16) if name == "slat" else None
    out = tool.sample(flow, tensors[f"noise_{name}"], tensors["features"], steps, guidance, voxels)
    return apart(out, tensors[f"{name}_{steps}"])


@pytest.mark.parametrize("small", [False, True])
class TestEachNetwork:
    def test_structure_flow(self, small):
        assert structure_flow(small) < LIMIT

    def test_structure_decoder(self, small):
        assert decoded_structure(small) < LIMIT

    def test_slat_flow(self, small):
        assert slat(small) < LIMIT

    def test_gaussian_decoder_field_by_field(self, small):
        assert all(difference < LIMIT for difference in gaussians(small).values())

    def test_condition(self, tmp_path, small):
        assert condition(tmp_path, small) < LIMIT


@pytest.mark.parametrize(("steps", "guidance"), tool.SAMPLED)
@pytest.mark.parametrize("name", ["structure", "slat"])
def test_samplers_to_the_last_step(name, steps, guidance):
    assert sampled(name, steps, guidance) < LIMIT


@torch.no_grad()
def whole() -> dict[str, float]:
    """Our generator beside the authors' pipeline and PLY, field by field."""
    tensors, _ = golden("trellis_whole")
    states = {name: weights(golden(f"trellis_{part}")[1]["shapes"]) for name, (_, _, part) in tool.PARTS.items()}
    states["sparse_structure_decoder"] = tool.sparse_structure(states["sparse_structure_decoder"])
    mine = tool.ply_fields(tool.whole_run(states, tensors.pop("features")))
    if len(mine["means"]) != len(tensors["means"]):
        return {"voxels": math.inf}
    return {field: apart(value, tensors[field]) for field, value in mine.items()}


def worst_of_the_whole() -> float:
    return max(whole().values())


def test_from_features_to_the_ply_as_their_pipeline():
    assert all(difference < LIMIT for difference in whole().values()), whole()


@pytest.mark.parametrize("compute", [structure_flow, decoded_structure, slat, worst_field])
def test_blocks_in_half_precision_are_close(monkeypatch, compute):
    """With norms, first and last layers in float32, as the service runs them on a GPU."""
    plain = tool.ours
    monkeypatch.setattr(tool, "ours", lambda *about: prepare(plain(*about), torch.float16))
    assert 1e-4 < compute() < 1e-2


# ---- mistakes, each planted ----


def true_mean(features, voxels):
    there = (voxels.children < len(features)).sum(1, keepdim=True)
    return F.pad(features, (0, 0, 0, 1))[voxels.children].sum(1) / there


def cosines_first(coords, channels):
    embedded = layers.position_embedding(coords, channels)
    count = channels // 6
    axes = embedded[:, : 6 * count].view(len(coords), 3, 2, count)
    return torch.cat([axes.flip(2).flatten(1), embedded[:, 6 * count :]], dim=1)


def sines_first(self, t):
    steps = torch.arange(self._half, dtype=torch.float32) / self._half
    angles = t.float()[:, None] * 10000.0**-steps
    return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class TestMistakesShow:
    def test_a_true_mean_in_place_of_the_sum_over_n_plus_1(self, monkeypatch):
        monkeypatch.setattr(slat_flow, "downsample", true_mean)
        assert slat() > CLEAR

    @pytest.mark.parametrize("compute", [structure_flow, slat, worst_field])
    def test_the_wrong_epsilon_in_blocks(self, monkeypatch, compute):
        for module in (layers, slat_flow, gaussian_decoder):
            monkeypatch.setattr(module, "BLOCK_EPS", 1e-5)
        assert compute(small=True) > CLEAR

    @pytest.mark.parametrize("compute", [structure_flow, slat, worst_field])
    def test_the_wrong_epsilon_before_the_output(self, monkeypatch, compute):
        monkeypatch.setattr(layers.plain_norm, "__defaults__", (1e-6,))
        assert compute(small=True) > CLEAR

    def test_the_wrong_epsilon_after_dinov2(self, monkeypatch, tmp_path):
        monkeypatch.setattr(layers.plain_norm, "__defaults__", (1e-6,))
        assert condition(tmp_path, small=True) > CLEAR

    def test_the_wrong_epsilon_in_the_structure_decoder(self, monkeypatch):
        plain = structure_decoder.ChannelNorm.__init__
        monkeypatch.setattr(structure_decoder.ChannelNorm, "__init__", lambda self, c: plain(self, c, eps=1e-6))
        assert decoded_structure(small=True) > CLEAR

    def test_dinov2s_own_normalisation(self, monkeypatch, tmp_path):
        def normalised(self, cutouts):
            pixels = (cutouts[:, :3] * cutouts[:, 3:] - self.mean) / self.std
            return layers.plain_norm(self.backbone(pixels).last_hidden_state)

        monkeypatch.setattr(Condition, "forward", normalised)
        assert condition(tmp_path) > CLEAR

    @pytest.mark.parametrize(("module", "compute"), [(slat_flow, slat), (gaussian_decoder, worst_field)])
    def test_cosines_before_sines_in_positions(self, monkeypatch, module, compute):
        monkeypatch.setattr(module, "position_embedding", cosines_first)
        assert compute() > CLEAR

    @pytest.mark.parametrize("compute", [structure_flow, slat])
    def test_sines_before_cosines_in_times(self, monkeypatch, compute):
        monkeypatch.setattr(layers.TimeEmbedding, "forward", sines_first)
        assert compute() > CLEAR

    @pytest.mark.parametrize("compute", [structure_flow, slat])
    def test_times_of_0_to_1(self, monkeypatch, compute):
        plain = layers.TimeEmbedding.forward
        monkeypatch.setattr(layers.TimeEmbedding, "forward", lambda self, t: plain(self, t / 1000))
        assert compute() > CLEAR

    @pytest.mark.parametrize("compute", [structure_flow, slat])
    def test_nothing_in_place_of_zero_features(self, monkeypatch, compute):
        monkeypatch.setattr(layers.CrossAttention, "unconditional", lambda self: self.to_out.bias)
        assert compute() > CLEAR

    @pytest.mark.parametrize("compute", [structure_flow, slat])
    def test_queries_and_keys_as_they_are(self, monkeypatch, compute):
        monkeypatch.setattr(layers.HeadNorm, "forward", lambda self, x: x)
        assert compute() > CLEAR

    @pytest.mark.parametrize("change", ["axes", "turned"])
    def test_kernels_in_another_order(self, monkeypatch, change):
        plain = SubmanifoldConv.forward

        def forward(self, features, rows):
            table = rows.view(-1, 3, 3, 3)
            table = table.transpose(1, 3) if change == "axes" else table.flip(1, 2, 3)
            return plain(self, features, table.reshape(-1, 27))

        monkeypatch.setattr(SubmanifoldConv, "forward", forward)
        assert slat() > CLEAR

    def test_another_order_of_upsampled_cells(self, monkeypatch):
        plain = structure_decoder.Upsampling.forward
        monkeypatch.setattr(structure_decoder.Upsampling, "forward", lambda self, x: plain(self, x).transpose(2, 4))
        assert decoded_structure() > CLEAR

    def test_windows_that_stay_where_they_are(self, monkeypatch):
        plain = gaussian_decoder.Windows
        monkeypatch.setattr(gaussian_decoder, "Windows", lambda level, size, shift: plain(level, size, 0))
        assert worst_field() > CLEAR

    @pytest.mark.parametrize(
        "change",
        [
            {"lr": {**tool.GAUSSIANS["lr"], "_rotation": 1.0}},
            {"perturb_offset": False},
            {"voxel_size": 1.0},
            {"scaling_bias": 0.01},
            {"3d_filter_kernel_size": 0.01},
            {"opacity_bias": 0.5},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_another_number_in_the_gaussians_config(self, monkeypatch, change):
        plain = tool.ours

        def ours(kind, config, state):
            about = {**config["representation_config"], **change}
            return plain(kind, {**config, "representation_config": about}, state)

        monkeypatch.setattr(tool, "ours", ours)
        assert worst_field() > CLEAR

    @pytest.mark.parametrize("name", ["structure", "slat"])
    def test_guidance_as_others_write_it(self, monkeypatch, name):
        def apply(self, x, conditional, unconditional, guidance):
            v = conditional if unconditional is None else guidance * conditional - (guidance - 1) * unconditional
            return x - (self.t - self.following) * v

        monkeypatch.setattr(Step, "apply", apply)
        assert sampled(name, 12, 7.5) > CLEAR

    @pytest.mark.parametrize("name", ["structure", "slat"])
    @pytest.mark.parametrize("mistake", ["exclusive", "before"])
    def test_another_share_of_steps_guided(self, monkeypatch, name, mistake):
        def other(steps, rescale, interval):
            low = interval[0]
            chosen = {
                "exclusive": lambda step: step.t > low,  # or the tie at 0.5 lost in float32
                "before": lambda step: step.t / (rescale - (rescale - 1) * step.t) >= low,  # of t before it is rescaled
            }[mistake]
            return [Step(s.t, s.following, bool(chosen(s))) for s in schedule(steps, rescale, interval)]

        monkeypatch.setattr(tool, "schedule", other)
        assert sampled(name, 12, 7.5) > CLEAR


class TestMistakesAroundTheNetworksShow:
    """In the generator: in what it gives them, and in what it makes of what they give."""

    @pytest.mark.parametrize("mistake", ["left out", "the other way round"])
    def test_normalisation_of_latents(self, monkeypatch, mistake):
        plain = GaussianDecoder.forward
        mean, std = (torch.tensor(tool.NORMALISATION[key]) for key in ("mean", "std"))

        def forward(self, x, level):
            x = (x - mean) / std
            return plain(self, x if mistake == "left out" else (x + mean) * std, level)

        monkeypatch.setattr(GaussianDecoder, "forward", forward)
        assert worst_of_the_whole() > CLEAR

    @pytest.mark.parametrize(
        "change",
        [
            {"structure_steps": 5}, {"slat_steps": 4}, {"structure_guidance": 1.0}, {"slat_guidance": 2.0},
            {"structure_interval": (0.3, 0.9)}, {"slat_interval": (0.6, 1.0)}, {"structure_rescale": 3.0},
            {"slat_rescale": 2.0},
        ],
        ids=lambda change: next(iter(change)),
    )  # fmt: skip
    def test_an_option_of_the_other_flow(self, monkeypatch, change):
        monkeypatch.setattr(tool, "WHOLE", tool.WHOLE | change)
        assert worst_of_the_whole() > CLEAR

    def test_times_of_0_to_1(self, monkeypatch):
        monkeypatch.setattr(
            Trellis, "_times", lambda self, steps, each: torch.tensor([step.t for step in steps for _ in range(each)])
        )
        assert worst_of_the_whole() > CLEAR

    @pytest.mark.parametrize("name", ["_velocities", "_slat_velocities"])
    def test_guided_where_it_should_not_be(self, monkeypatch, name):
        plain = getattr(Trellis, name)

        def velocities(self, works, steps):
            return plain(self, works, [Step(step.t, step.following, True) for step in steps])

        monkeypatch.setattr(Trellis, name, velocities)
        assert worst_of_the_whole() > CLEAR

    def test_another_noise(self, monkeypatch):
        plain = torch.randn
        monkeypatch.setattr(torch, "randn", lambda *shape, **options: plain(*shape, **options).flip(0, -1))
        assert worst_of_the_whole() > CLEAR

    def test_rotations_turned_from_the_right_as_well(self, monkeypatch):
        """Which leaves round Gaussians as they are."""
        plain = generator.to_gaussians

        def to_gaussians(raw):
            w, i, j, k = F.normalize(raw.quats, dim=1).unbind(1)
            return replace(plain(raw), quats=torch.stack([w, i, k, -j], dim=1))

        monkeypatch.setattr(generator, "to_gaussians", to_gaussians)
        assert whole()["rotations"] > CLEAR


def test_how_many_steps_are_guided():
    """Of 12 steps the tenth is at exactly 0.5, which is in the interval; float32 may lose it."""
    assert sum(step.guided for step in schedule(12, 3.0, (0.5, 1.0))) == 10
    assert sum(step.guided for step in schedule(25, 3.0, (0.5, 1.0))) == 19
    assert schedule(12, 3.0, (0.5, 1.0))[9].t == 0.5
    assert sampler.schedule(1, 3.0, (0.5, 1.0)) == [Step(1.0, 0.0, True)]


# ---- full size, and files that do not fit ----

#: parameters and buffers, as generators.md's sizes of the public files have them; the first as a public record counts
COUNTS = {"StructureFlow": 559_737_864, "StructureDecoder": 73.67e6, "SlatFlow": 600.4e6, "GaussianDecoder": 85.37e6}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_published_sizes(kind):
    with torch.device("meta"):
        state = build(kind, PUBLISHED[kind]).state_dict()
    count = sum(tensor.numel() for tensor in state.values())
    assert count == pytest.approx(COUNTS[kind.__name__], rel=1e-4)
    if kind is StructureFlow:
        assert (len(state), count) == (489, COUNTS["StructureFlow"])


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return write_pipeline(tmp_path / "trellis")

    def change(self, folder: Path, part: str, edit: Callable[[dict], object]) -> None:
        path = folder / "ckpts" / f"{part}.safetensors"
        state = load_file(path)
        edit(state)
        save_file(state, path)

    def test_it_loads(self, folder):
        networks = Networks.load(folder, "cpu", torch.float32)
        assert networks.mean.tolist() == pytest.approx([-2.0, 0.5, 0.0, 1.0])
        assert not any(p.requires_grad for p in networks.slat_flow.parameters())

    def test_half_precision_is_of_blocks_alone(self, folder):
        networks = Networks.load(folder, "cpu", torch.bfloat16)
        flow: Any = networks.slat_flow
        assert flow.blocks[0].mlp.mlp[0].weight.dtype == flow.input_blocks[0].conv1.conv.weight.dtype == torch.bfloat16
        single = [flow.input_layer.weight, flow.blocks[0].norm2.weight, flow.blocks[0].self_attn.q_rms_norm.gamma]
        single += [flow.out_layer.weight, flow.t_embedder.mlp[0].weight, networks.structure_flow.pos_emb]
        assert {tensor.dtype for tensor in single} == {torch.float32}

    def test_a_missing_tensor(self, folder):
        self.change(folder, "slat_flow", lambda state: state.pop("blocks.1.cross_attn.to_kv.bias"))
        with pytest.raises(
            WeightsError, match=r"slat_flow: not a usable SlatFlow: .*blocks\.1\.cross_attn\.to_kv\.bias"
        ):
            Networks.load(folder, "cpu", torch.float32)

    def test_one_too_many(self, folder):
        self.change(folder, "slat_dec", lambda state: state.update(extra=torch.zeros(1)))
        with pytest.raises(WeightsError, match=r"slat_dec: not a usable GaussianDecoder: .*extra"):
            Networks.load(folder, "cpu", torch.float32)

    def test_one_of_another_shape(self, folder):
        self.change(folder, "ss_flow", lambda state: state.update(pos_emb=torch.zeros(3, 32)))
        with pytest.raises(WeightsError, match=r"ss_flow: .*pos_emb"):
            Networks.load(folder, "cpu", torch.float32)

    def test_what_it_can_not_be(self, folder):
        path = folder / "ckpts" / "slat_flow.json"
        about = json.loads(path.read_text())
        about["args"]["pe_mode"] = "rope"
        path.write_text(json.dumps(about))
        with pytest.raises(WeightsError, match=r"pe_mode 'rope' is not supported, only 'ape'"):
            Networks.load(folder, "cpu", torch.float32)

    def test_a_pipeline_without_a_part(self, folder):
        path = folder / "pipeline.json"
        about = json.loads(path.read_text())
        del about["args"]["models"]["slat_decoder_gs"]
        path.write_text(json.dumps(about))
        with pytest.raises(WeightsError, match="names no slat_decoder_gs"):
            Networks.load(folder, "cpu", torch.float32)


def test_only_what_splats_need_is_fetched():
    """Of the published repository's files."""
    parts = {
        "slat_dec_gs_swin8_B_64l8gs32_fp16", "slat_flow_img_dit_L_64l8p2_fp16", "ss_dec_conv3d_16l8_fp16",
        "ss_flow_img_dit_L_16l8_fp16",
    }  # fmt: skip
    others = {
        "slat_dec_mesh_swin8_B_64l8m256c_fp16", "slat_dec_rf_swin8_B_64l8r16_fp16", "slat_enc_swin8_B_64l8_fp16",
        "ss_enc_conv3d_16l8_fp16",
    }  # fmt: skip
    there = [f"ckpts/{name}.{kind}" for name in parts | others for kind in ("json", "safetensors")]
    entry = REGISTRY["trellis-image-large"]
    fetched = wanted([*there, "pipeline.json", "README.md", ".gitattributes"], entry.files)
    assert set(fetched) == {"pipeline.json", *(f"ckpts/{p}.{kind}" for p in parts for kind in ("json", "safetensors"))}
    assert {name for name, _ in entry.sha256} == {f"ckpts/{part}.safetensors" for part in parts}
    assert entry.pinned
    assert REGISTRY["dinov2-with-registers-large"].pinned


def write_pipeline(folder: Path) -> Path:
    """A folder in the published layout."""
    parts = {
        "ss_flow": ("sparse_structure_flow_model", StructureFlow, tool.STRUCTURE_FLOW),
        "ss_dec": ("sparse_structure_decoder", StructureDecoder, tool.STRUCTURE_DECODER),
        "slat_flow": ("slat_flow_model", SlatFlow, tool.SLAT_FLOW),
        "slat_dec": ("slat_decoder_gs", GaussianDecoder, tool.GAUSSIAN_DECODER),
    }
    (folder / "ckpts").mkdir(parents=True)
    models = {}
    for name, (key, kind, config) in parts.items():
        (folder / "ckpts" / f"{name}.json").write_text(json.dumps({"name": "x", "args": config}))
        save_file(build(kind, config).state_dict(), folder / "ckpts" / f"{name}.safetensors")
        models[key] = f"ckpts/{name}"
    normalisation = {"mean": [-2.0, 0.5, 0.0, 1.0], "std": [2.0, 2.0, 1.0, 1.0]}
    about = {"args": {"models": models, "slat_normalization": normalisation}}
    (folder / "pipeline.json").write_text(json.dumps(about))
    return folder


# ---- parts ----


def test_a_convolution_in_pieces_is_the_same(monkeypatch):
    cells = torch.argwhere(torch.rand(8, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.7)
    level = Voxels.of(cells, 8).fine
    conv, x = SubmanifoldConv(4, 6), torch.randn(len(cells), 4)
    whole = conv(x, level.neighbours)
    monkeypatch.setattr(sparse, "GATHERED", 27 * 4 * 10)
    assert torch.allclose(conv(x, level.neighbours), whole, atol=1e-6)
    dense = torch.zeros(1, 4, 8, 8, 8)
    dense[0, :, cells[:, 0], cells[:, 1], cells[:, 2]] = x.T
    out = F.conv3d(dense, conv.conv.weight.permute(0, 4, 1, 2, 3), conv.conv.bias, padding=1)
    assert torch.allclose(out[0, :, cells[:, 0], cells[:, 1], cells[:, 2]].T, whole, atol=1e-5)


def test_a_sample_among_others_is_as_alone():
    tensors, flow = network("slat_flow", SlatFlow, False)
    voxels = cells(tensors)
    first = len(voxels[0].fine.coords)
    contexts = [flow.project_context(each) for each in tensors["features"]]
    both = Voxels.join(voxels)
    together = flow(tensors["x"], tensors["t"], contexts, both, Voxels.join([*voxels, voxels[0]]))
    alone = flow(tensors["x"][:first], tensors["t"][:1], contexts[:1], voxels[0], Voxels.join([voxels[0]] * 2))
    assert apart(together[:first], alone[:first]) < 1e-5
    assert apart(together[-first:], alone[first:]) < 1e-5  # without a picture


def test_one_voxel():
    voxels = Voxels.of(torch.tensor([[15, 0, 7]]), 16)
    assert voxels.fine.neighbours.tolist() == [[1] * 13 + [0] + [1] * 13]
    assert voxels.coarse.coords.tolist() == [[7, 0, 3]]
    assert voxels.parents.tolist() == [0]
    assert sparse.downsample(torch.tensor([[3.0]]), voxels).tolist() == [[1.5]]


def test_position_embedding_of_a_width_that_six_does_not_divide():
    embedded = layers.position_embedding(torch.tensor([[1, 2, 3]]), 1024)
    assert embedded.shape == (1, 1024)
    assert embedded[0, 1020:].tolist() == [0] * 4
    assert float(embedded[0, 0]) == pytest.approx(math.sin(1))
    assert float(embedded[0, 170]) == pytest.approx(math.cos(1))
    assert structure_flow_module.position_embedding is layers.position_embedding
