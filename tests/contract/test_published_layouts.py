"""From a hub with the published layouts, made small, to splats: downloaded by name, then loaded without a network."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.pipeline import assemble
from generation.pipeline.pipeline import Request
from generation.schema.options import Models
from generation.settings import CONFIGS, ROOT, Settings
from generation.weights import missing
from generation.weights.registry import REGISTRY
from scripts.tools.golden_weights import golden, weights
from tests.support import downloads, mini_checkpoints, mini_matting
from tests.support.fake_hub import Repository, serve

GUIDED = CONFIGS / "tiny_mv_fast.yaml"
NAMES = ["flux.1-schnell", "rmbg-2.0", "mvdream-sd2.1", "zero123-xl", "stable-zero123", "clip-convnext-large-d"]
MODELS = """
text_to_image: {model: flux.1-schnell, image_size: 64, steps: 1, max_sequence_length: 16}
background: {model: rmbg-2.0, image_size: 64}
mvdream: {model: mvdream-sd2.1}
zero123: {model: zero123-xl}
stable_zero123: {model: stable-zero123}
clip: {model: clip-convnext-large-d}
"""
CONFIG = """
iters: 2
ref_size: 64
render_size: 64
num_pts: 7500
density_end_iter: 0
"""

pytestmark = pytest.mark.slow


def matting(folder: Path) -> None:
    """RMBG-2.0's file names around a small net that says: everything is the object."""
    net = mini_matting.MiniMatting(mini_matting.MiniMattingConfig())
    state = net.state_dict()
    state["head.weight"].zero_()
    state["head.bias"].fill_(20.0)
    save_file(state, folder / "model.safetensors")
    auto_map = {
        "AutoConfig": "birefnet.MiniMattingConfig",
        "AutoModelForImageSegmentation": "birefnet.MiniMatting",
    }
    (folder / "config.json").write_text(json.dumps({"width": 8, "auto_map": auto_map}))
    (folder / "birefnet.py").write_text(Path(mini_matting.__file__).read_text())
    (folder / "BiRefNet_config.py").write_text("")


def published_unet(folder: Path) -> None:
    """MVDream's UNet with its authors' names, as wide in its words as the mini text encoder."""
    about = golden("mvdream_unet")[1]
    words = about["config"]["context_dim"]
    shapes = {
        name: [mini_checkpoints.WIDTH if size == words and ".attn2.to_" in name else size for size in shape]
        for name, shape in about["shapes"].items()
    }
    config = {**about["config"], "context_dim": mini_checkpoints.WIDTH, "_class_name": "MultiViewUNetModel"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(shapes), folder / "diffusion_pytorch_model.safetensors")


def clip(folder: Path) -> None:
    """Without a tokenizer of its own, as the public one: open_clip brings it."""
    mini_checkpoints.clip(folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    path.write_text(json.dumps(config))
    (folder / "open_clip_model.safetensors").unlink()
    save_file(open_clip.create_model(f"local-dir:{folder}").state_dict(), folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Repository]:
    """What the hub has, by the repositories' names."""
    root = tmp_path_factory.mktemp("published")
    folders = {name: root / name for name in NAMES}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mini_checkpoints.flux(folders["flux.1-schnell"])
        mini_checkpoints.mvdream(folders["mvdream-sd2.1"])
        published_unet(folders["mvdream-sd2.1"] / "unet")
        mini_checkpoints.zero123(folders["zero123-xl"])
        mini_checkpoints.zero123(folders["stable-zero123"])
        clip(folders["clip-convnext-large-d"])
        folders["rmbg-2.0"].mkdir()
        matting(folders["rmbg-2.0"])
    repositories = {}
    for number, (name, folder) in enumerate(folders.items()):
        entry = REGISTRY[name]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        files.pop("card.json", None)
        commit = entry.revision if entry.pinned else f"{number}" * 40
        assert entry.repo is not None
        repositories[entry.repo] = Repository(commit, files)
    return repositories


def test_downloaded_by_name_and_loaded_offline(published, tmp_path, monkeypatch, no_network):
    only = [argument for name in NAMES for argument in ("--only", name)]
    with serve(published) as hub:
        done = downloads.run(hub, tmp_path, *only)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models = tmp_path / "models.yaml"
    models.write_text(MODELS)
    assert missing(Models.load(models).stages.values()) == []
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((0, 0, 255), (16, 16, 48, 48))
    guided = {
        "mvdream": "",
        "zero123": "lambda_sd: 0\nlambda_zero123: 1",
        "stable_zero123": "lambda_sd: 0\nlambda_zero123: 1\nstable_zero123: true",
        "both": "lambda_zero123: 1",
    }
    for name, keys in guided.items():
        config = tmp_path / f"{name}.yaml"
        config.write_text(CONFIG + keys)
        pipeline = assemble.load(Settings.resolve({"profile": "tiny", "models": models, "config": config}))
        stages = {model["stage"] for model in pipeline.models} - {"text_to_image", "background", "clip"}
        assert stages == ({"mvdream", "zero123"} if name == "both" else {name})
        text = Request(prompt="a red cube", seed=1, threshold=0.0)
        image = Request(image=picture, seed=1, threshold=0.0)
        for asset in pipeline.generate([text, image]):
            assert not isinstance(asset, Exception), asset
            assert asset.report.num_gaussians == 7500


def test_weights_of_another_model_are_named(published, tmp_path, mini_models):
    """A file that is whole but not the right one: which model, which folder, which tensor, and what to do."""
    entry = REGISTRY["mvdream-sd2.1"]
    folder = tmp_path / "mvdream"
    for name, content in published[entry.repo].files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "card.json").write_text('{"of": "mvdream-sd2.1"}')
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["encoder.conv_in.bias"]
    save_file(state, path)
    models = tmp_path / "models.yaml"
    models.write_text(mini_models.read_text().replace("./mvdream", str(folder)).replace("./", f"{mini_models.parent}/"))
    with pytest.raises(ValueError, match=r"mvdream-sd2\.1 can not be loaded: .*vae.*encoder\.conv_in\.bias; copy its"):
        assemble.load(Settings.resolve({"profile": "tiny", "models": models, "config": GUIDED}))


def test_the_full_profiles_models_are_those_that_were_served():
    full = Models.load(ROOT / "configs" / "models_full.yaml")
    # The score's further parts are in test_score, alexnet's address is in test_download; LGM's, ImageDream's and
    # TRELLIS's files have tests of their own.
    assert {choice.model for stage, choice in full.stages.items() if stage not in full.optional} == {
        *NAMES, "lgm-big", "imagedream", "trellis-image-large", "dinov2-with-registers-large"
    }  # fmt: skip
    assert full.needed(DreamGaussianOptions.load(ROOT / "configs" / "image_fast.yaml")).keys() >= {"zero123"}
