"""The authors' own code computed what lies in tests/golden (scripts/tools/fidelity/); ours must agree without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from generation.generators.dreamgaussian.guidance.zero123 import camera_numbers, load_projection
from generation.generators.dreamgaussian.schedule import position_lr
from generation.generators.lgm import unet
from generation.generators.lgm.network import BIG, LGM, Config, plucker_rays, to_gaussians
from generation.generators.multiview.attention import join_views
from generation.splats.cameras import orbit
from generation.weights import WeightsError
from generation.weights.latent_diffusion import load_unet, rename_unet, unet_config
from generation.weights.registry import REGISTRY
from generation.weights.strict import load_model, naming
from scripts.tools.golden_weights import golden, lgm_views, lgm_weights, weights

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}


def unet_folder(folder: Path, about: dict) -> Path:
    """A checkpoint in the authors' naming."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about["config"]))
    save_file(weights(about["shapes"]), folder / "diffusion_pytorch_model.safetensors")
    return folder


@torch.no_grad()
def test_mvdream_unet(tmp_path):
    tensors, about = golden("mvdream_unet")
    unet = load_unet(unet_folder(tmp_path / "unet", about), torch.float32).eval()
    alone = unet(tensors["x"], tensors["t"], tensors["text"], class_labels=tensors["cameras"]).sample
    assert not torch.allclose(alone, tensors["noise"], atol=1e-2)  # the views have to see each other
    join_views(unet, 4)
    noise = unet(tensors["x"], tensors["t"], tensors["text"], class_labels=tensors["cameras"]).sample
    assert torch.allclose(noise, tensors["noise"], **CLOSE)


@torch.no_grad()
def test_zero123_unet_and_projection(tmp_path):
    tensors, about = golden("zero123_unet")
    unet = load_unet(unet_folder(tmp_path / "unet", about), torch.float32).eval()
    (tmp_path / "cc_projection").mkdir()
    mixing = {f"projection.{name}": tensor for name, tensor in weights(about["projection"], seed=3).items()}
    save_file(mixing, tmp_path / "cc_projection" / "diffusion_pytorch_model.safetensors")
    layer = load_projection(tmp_path, 24)
    words = layer(torch.cat([tensors["clip"], tensors["camera"]], 1))[:, None]
    noise = unet(torch.cat([tensors["x"], tensors["view"]], 1), tensors["t"], words).sample
    assert torch.allclose(noise, tensors["noise"], **CLOSE)


@pytest.mark.parametrize(("name", "stable"), [("zero123-xl", False), ("stable-zero123", True)])
def test_zero123_cameras(name, stable):
    tensors, _ = golden(f"{name}_cameras")
    reference = -tensors["reference"]
    elevation, azimuth = tensors["angles"].unbind(1)  # relative; the authors' sign: positive is lower
    poses = orbit(reference - elevation, azimuth, 2.0, 49.1, 8, 8).camera_to_world
    numbers = camera_numbers(poses, reference.expand(len(poses)), stable)
    assert torch.allclose(numbers, tensors["numbers"], **CLOSE)


def test_orbit_cameras():
    tensors, _ = golden("orbit")
    elevation, azimuth = tensors["angles"].unbind(1)
    assert torch.allclose(orbit(-elevation, azimuth, 2.0, 49.1, 8, 8).camera_to_world, tensors["poses"], **CLOSE)


def test_learning_rate():
    tensors, _ = golden("learning_rate")
    rates = torch.tensor([position_lr(step, 0.001, 0.00002, 300) for step in range(1, 501, 20)])
    assert torch.allclose(rates, tensors["rates"], atol=0, rtol=1e-4)


class TestLGM:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        """A checkpoint as the public one, but with a config, for it is smaller."""
        about = golden("lgm")[1]
        save_file(lgm_weights(about["shapes"]), tmp_path / "model_fp16_fixrot.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(about["config"]))
        return tmp_path

    @torch.no_grad()
    def test_gaussians_of_two_objects(self, folder):
        model = LGM.load(folder, "cpu", torch.float32)
        assert torch.allclose(model(lgm_views(), model.rays())[:, ::8], golden("lgm")[0]["splats"], **CLOSE)

    def test_half_precision_is_near(self, folder):
        model = LGM.load(folder, "cpu", torch.float16)
        splats = model(lgm_views(), model.rays())
        assert splats.dtype == torch.float32
        assert float((splats[:, ::8] - golden("lgm")[0]["splats"]).abs().mean()) < 3e-3

    def test_rays(self):
        tensors, about = golden("lgm")
        config = Config(**{key: tuple(v) if isinstance(v, list) else v for key, v in about["config"].items()})  # type: ignore[arg-type]
        for name, elevation in (("rays", 0.0), ("raised", 20.0)):
            poses = orbit(elevation, torch.arange(4) * 90.0, config.radius, config.fovy, 32, 32).camera_to_world
            assert torch.allclose(plucker_rays(poses, 32, config.fovy)[:, :, ::8, ::8], tensors[name], **CLOSE)

    def test_the_published_ones_cameras_are_the_authors_options(self):
        rays = plucker_rays(BIG.cameras().camera_to_world, BIG.input_size, BIG.fovy)
        assert torch.allclose(rays[:, :, ::32, ::32], golden("lgm")[0]["big_rays"], **CLOSE)
        assert (BIG.background, BIG.min_opacity) == ((1.0, 1.0, 1.0), 0.005)  # as in their infer.py and save_ply

    def test_their_ply(self):
        tensors, _ = golden("lgm")
        for field, value in to_gaussians(tensors["splats"][0]).tensors().items():
            assert torch.allclose(value, tensors[f"ply_{field}"], **CLOSE), field

    @pytest.mark.parametrize(
        "mistake",
        ["skips not scaled", "views apart", "azimuth the other way", "rows upside down", "moments reversed",
         "directions first", "corners of pixels", "not normalised", "another field of view"],
    )  # fmt: skip
    @torch.no_grad()
    def test_each_convention_counts(self, folder, mistake, monkeypatch):
        model, views = LGM.load(folder, "cpu", torch.float32), lgm_views()
        rays = model.rays()
        moments, directions = rays.split(3, 1)
        if mistake == "skips not scaled":
            monkeypatch.setattr(unet, "SKIP", 1.0)
        elif mistake == "views apart":
            attend = unet.MultiViewAttention.forward
            monkeypatch.setattr(unet.MultiViewAttention, "forward", lambda self, x, views: attend(self, x, 1))
        elif mistake == "azimuth the other way":
            rays = rays[[0, 3, 2, 1]]
        elif mistake == "rows upside down":
            rays = rays.flip(2)
        elif mistake == "moments reversed":
            rays = torch.cat([-moments, directions], 1)
        elif mistake == "directions first":
            rays = torch.cat([directions, moments], 1)
        elif mistake == "corners of pixels":
            poses = model.config.cameras().camera_to_world
            rays = plucker_rays(poses, 64, model.config.fovy)[:, :, ::2, ::2]
        elif mistake == "not normalised":
            views = views * 0.226 + 0.449
        else:
            rays = plucker_rays(model.config.cameras().camera_to_world, 32, 45.0)
        wanted = golden("lgm")[0]["splats"]
        assert float((model(views, rays)[:, ::8] - wanted).abs().max()) > 10 * CLOSE["atol"]

    @pytest.mark.parametrize("name", ["conv.bias", "unet.mid_block.attns.0.attn.qkv.weight"])
    def test_a_missing_tensor(self, folder, name):
        state = lgm_weights(golden("lgm")[1]["shapes"])
        del state[name]
        save_file(state, folder / "model_fp16_fixrot.safetensors")
        with pytest.raises(WeightsError, match=f"model_fp16_fixrot.safetensors: not the weights of LGM.*{name}"):
            LGM.load(folder, "cpu", torch.float32)

    @pytest.mark.parametrize(
        ("change", "words"),
        [({"width": 3}, "unknown: width"), ({"position": "near"}, "expected 'absolute' or 'ray'"),
         ({"down_channels": [32, 32, 64]}, "as many levels"), ({"norm_groups": 24}, "multiples of norm_groups"),
         ({"up_channels": [64, 32, 32]}, "backwards"), ({"input_size": 20}, "halved 3 times"),
         ({"attention_heads": 48}, "48 heads"), ({"views": []}, "views is empty")],
    )  # fmt: skip
    def test_a_wrong_config(self, folder, change, words):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=words):
            LGM.load(folder, "cpu", torch.float32)

    def test_without_a_config_it_is_the_published_size(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(WeightsError, match="size mismatch"):
            LGM.load(folder, "cpu", torch.float32)
        with torch.device("meta"):
            big = LGM(BIG)
        assert sum(tensor.numel() for tensor in big.state_dict().values()) == 415_042_848
        assert BIG.gaussians == 65_536
        assert REGISTRY["lgm-big"].files == ("model_fp16_fixrot.safetensors",)  # the older one's rotations are wrong


class TestWrongWeights:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return unet_folder(tmp_path / "unet", golden("mvdream_unet")[1])

    def change(self, folder: Path, **changes) -> None:
        state = weights(golden("mvdream_unet")[1]["shapes"])
        for name, tensor in changes.items():
            state.pop(name.replace("__", "."), None)
            if tensor is not None:
                state[name.replace("__", ".")] = tensor
        save_file(state, folder / "diffusion_pytorch_model.safetensors")

    def test_a_missing_tensor(self, folder):
        self.change(folder, camera_embed__0__bias=None)
        with pytest.raises(WeightsError, match=r"unet: not a usable UNet.*class_embedding\.linear_1\.bias"):
            load_unet(folder, torch.float32)

    def test_one_of_another_shape(self, folder):
        self.change(folder, camera_embed__0__bias=torch.zeros(3))
        with pytest.raises(WeightsError, match=r"class_embedding\.linear_1\.bias"):
            load_unet(folder, torch.float32)

    def test_one_too_many(self, folder):
        self.change(folder, label_emb__0__weight=torch.zeros(3))
        with pytest.raises(WeightsError, match=r"label_emb\.0\.weight"):
            load_unet(folder, torch.float32)

    def test_no_weights(self, folder):
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(WeightsError, match="no usable weights"):
            load_unet(folder, torch.float32)

    def test_a_config_that_lacks_a_key(self, folder):
        (folder / "config.json").write_text(json.dumps({"model_channels": 32}))
        with pytest.raises(WeightsError, match="channel_mult"):
            load_unet(folder, torch.float32)

    def test_diffusers_own_layout_is_held_to_it_too(self, mini_models, tmp_path):
        import shutil

        from safetensors.torch import load_file

        folder = Path(shutil.copytree(mini_models.parent / "mvdream" / "unet", tmp_path / "diffusers"))
        path = folder / "diffusion_pytorch_model.safetensors"
        state = load_file(path)
        del state["conv_in.bias"]
        save_file(state, path)
        with pytest.raises(WeightsError, match=r"missing_keys: conv_in\.bias"):
            load_unet(folder, torch.float32)


def test_the_public_size_is_stable_diffusion_2_1_with_a_camera():
    config = golden("mvdream_unet")[1]["config"] | {
        "image_size": 32, "model_channels": 320, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64, "context_dim": 1024,
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(config))
    camera = (16 + 1) * 1280 + (1280 + 1) * 1280
    assert sum(tensor.numel() for tensor in unet.state_dict().values()) == 865_910_724 + camera


def test_every_name_has_one_of_its_own():
    shapes = golden("mvdream_unet")[1]["shapes"]
    assert len(rename_unet(dict.fromkeys(shapes, torch.zeros(1)), 2)) == len(shapes)


def test_a_pickle_in_place_of_safetensors(tmp_path):
    """Older repositories have one. Anything in it that is not a tensor is refused, not run."""
    folder = tmp_path / "clip_camera_projection"
    folder.mkdir()
    state = {"proj.weight": torch.ones(24, 28), "proj.bias": torch.zeros(24)}
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    assert torch.equal(load_projection(tmp_path, 24).weight, state["proj.weight"])
    torch.save({**state, "more": Path("elsewhere")}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError, match="no usable weights"):
        load_projection(tmp_path, 24)


def test_the_devices_faults_are_not_the_files():
    entry = REGISTRY["mvdream-sd2.1"]
    with pytest.raises(torch.OutOfMemoryError), naming(entry):
        raise torch.OutOfMemoryError("CUDA out of memory")
    words = r"mvdream-sd2\.1 can not be loaded: size mismatch for x; get it: .*--only"
    with pytest.raises(WeightsError, match=words), naming(entry):
        raise RuntimeError("size\nmismatch  for x")


@pytest.mark.parametrize("kind", [TypeError, AttributeError, IndexError, SyntaxError])
def test_files_of_another_kind_are_named(kind):
    """JSON that is no object, a model's own code that is cut short."""
    with (
        pytest.raises(WeightsError, match=r"mvdream-sd2\.1 can not be loaded: .*NoneType"),
        naming(REGISTRY["mvdream-sd2.1"]),
    ):
        raise kind("argument of type 'NoneType' is not iterable")


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("GET was unable to find an engine to execute this computation: CUDNN_FE failure"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_a_devices_fault_within_a_loader_is_not_the_files_either(fault, tmp_path):
    class Model:
        @staticmethod
        def from_pretrained(*_, **__):
            raise fault

    words = "can not be loaded, for the device failed"
    with pytest.raises(RuntimeError, match=words) as raised, naming(REGISTRY["mvdream-sd2.1"]):
        load_model(Model, tmp_path, torch.float32)
    assert str(fault) in str(raised.value)
    assert "--only" not in str(raised.value)


def test_projection_that_does_not_fit(tmp_path):
    (tmp_path / "clip_camera_projection").mkdir()
    path = tmp_path / "clip_camera_projection" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(WeightsError, match="clip_camera_projection"):
        load_projection(tmp_path, 24)
    save_file({"proj.weight": torch.zeros(24, 27), "proj.bias": torch.zeros(24)}, path)
    with pytest.raises(WeightsError, match="not the projection"):
        load_projection(tmp_path, 24)
