"""What the authors' code computed for ImageDream and MVDream's views (scripts/tools/fidelity/) lies in tests/golden;
ours must agree without it, and with a mistake in any convention it must not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from generation.generators.multiview import ImageDream, MVDreamViews, attention, image_prompt, imagedream
from generation.generators.multiview.attention import camera_embedding, join_views
from generation.generators.multiview.image_prompt import load_image_prompt_unet
from generation.splats.cameras import orbit
from generation.weights import WeightsError
from generation.weights.loading import local_folder
from generation.weights.registry import REGISTRY
from scripts.tools import small_imagedream
from scripts.tools.golden_weights import golden, weights
from tests.support import downloads
from tests.support.fake_hub import Repository, serve

ROOT = Path(__file__).resolve().parents[2]
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
FULL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_head_channels": 64, "context_dim": 1024, "camera_dim": 16,
    "ip_dim": 16,
}  # fmt: skip


def write_unet(folder: Path, config: dict, state: dict[str, Tensor]) -> Path:
    """A UNet's folder as the authors save it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "MultiViewUNetModel", **config}))
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


def written(folder: Path, name: str) -> Path:
    """A whole folder around the UNet of a golden file."""
    about = golden(name)[1]
    small_imagedream.write(folder, about["config"]["context_dim"], picture="ip_dim" in about["config"])
    write_unet(folder / "unet", about["config"], small_imagedream.unet_weights(about["shapes"]))
    return folder


# ---- the UNet with its resampler ----

Change = Callable[[nn.Module, nn.Module], object]


@torch.no_grad()
def unet_noise(folder: Path, change: Change = lambda unet, resampler: None, quiet: bool = False) -> Tensor:
    tensors, about = golden("imagedream_unet")
    state = weights(about["shapes"])
    write_unet(folder, about["config"], small_imagedream.quiet(state) if quiet else state)
    unet, resampler = load_image_prompt_unet(folder, torch.float32)
    join_views(unet.eval(), 5, shared_text=True, image_tokens=4)
    change(unet, resampler)
    inputs = weights({"x": [2, 4, 4, 8, 8], "picture": [2, 4, 8, 8], "text": [2, 5, 24], "seen": [2, 9, 1280]}, seed=8)
    frames = torch.cat([inputs["x"], inputs["picture"][:, None]], 1).flatten(0, 1)
    cameras = camera_embedding(orbit(0.0, torch.arange(4) * 90.0, 1.0, 49.1, 8, 8).camera_to_world)
    return unet(
        frames,
        tensors["t"].repeat_interleave(5),
        torch.cat([inputs["text"], resampler(inputs["seen"])], 1),
        class_labels=F.pad(cameras, (0, 0, 0, 1)).repeat(2, 1),
    ).sample


@pytest.mark.parametrize("quiet", [False, True])
def test_unet(tmp_path, quiet):
    expected = golden("imagedream_unet")[0]["hushed" if quiet else "noise"]
    assert torch.allclose(unet_noise(tmp_path, quiet=quiet), expected, **CLOSE)


def epsilon(part: int, kind: type[nn.Module], was: float, becomes: float) -> Change:
    def change(*parts: nn.Module) -> None:
        layers: list[Any] = [layer for layer in parts[part].modules() if isinstance(layer, kind) and layer.eps == was]
        assert layers
        for layer in layers:
            layer.eps = becomes

    return change


def no_attention_to_the_picture(unet: nn.Module, resampler: nn.Module) -> None:
    for name, parameter in unet.named_parameters():
        if name.endswith("to_v_ip.weight"):
            parameter.zero_()


def views_one_by_one(unet: Any, resampler: nn.Module) -> None:
    for name, processor in unet.attn_processors.items():
        if ".attn1." in name:
            processor.views = 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "quiet"),
    [
        (epsilon(0, nn.GroupNorm, 1e-6, 1e-5), True),
        (epsilon(0, nn.GroupNorm, 1e-5, 1e-6), True),
        (epsilon(0, nn.LayerNorm, 1e-5, 1e-6), True),
        (epsilon(1, nn.LayerNorm, 1e-5, 1e-6), True),
        (no_attention_to_the_picture, False),
        (views_one_by_one, False),
    ],
)
def test_a_mistake_in_the_unet_is_seen(tmp_path, change, quiet):
    expected = golden("imagedream_unet")[0]["hushed" if quiet else "noise"]
    assert (unet_noise(tmp_path, change, quiet) - expected).abs().max() > 1e-3


def test_full_size_fills_the_published_files():
    """By their bytes: two for each number, and a header of some hundred for each tensor."""
    with torch.device("meta"):
        unet, resampler = image_prompt.build(FULL)
        vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
                patch_size=14,
            )
        )  # fmt: skip
    tensors = [*unet.state_dict().values(), *resampler.state_dict().values()]
    assert 0 < 1_883_435_904 - 2 * sum(t.numel() for t in tensors) < 150 * len(tensors)
    seen = vision.state_dict().values()
    assert 0 < 1_261_595_704 - 2 * sum(t.numel() for t in seen) < 150 * len(seen)


# ---- one whole sampling ----


def draw(multiview: ImageDream | MVDreamViews, words: str, cutout: Tensor | None) -> tuple[Tensor, Tensor]:
    (sampling,) = multiview.begin([words], [cutout], [5])
    while not sampling.done:
        multiview.step([sampling])
    return sampling.latents, F.avg_pool2d(multiview.views([sampling])[0], 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("imagedream"), "imagedream_views")


def loaded(folder: Path, **options: object) -> ImageDream:
    return ImageDream.load(
        folder, "cpu", torch.float32, **{"front_azimuth": REGISTRY["imagedream"].front_azimuth, "steps": 5, **options}
    )


def agrees(multiview: ImageDream | MVDreamViews, name: str, words: str, cutout: Tensor | None) -> bool:
    tensors, _ = golden(name)
    latents, small = draw(multiview, words, cutout)
    return torch.allclose(latents, tensors["latents"], **CLOSE) and torch.allclose(small, tensors["small"], **CLOSE)


@pytest.mark.slow
def test_views_of_a_picture(folder):
    assert agrees(loaded(folder), "imagedream_views", "", small_imagedream.cutout())


@pytest.mark.slow
def test_views_of_words(tmp_path):
    multiview = MVDreamViews.load(
        written(tmp_path, "mvdream_views"),
        "cpu",
        torch.float32,
        front_azimuth=REGISTRY["mvdream-sd2.1"].front_azimuth,
        steps=5,
        guidance_scale=7.5,
    )
    assert agrees(multiview, "mvdream_views", "a red cube, 3d asset", None)
    multiview._cameras = multiview._cameras.roll(1, 0)
    assert not agrees(multiview, "mvdream_views", "a red cube, 3d asset", None)


def noise_in_the_last_frame(latents, t, signal, known):
    return imagedream.picture_as_last_frame(latents, t, signal, torch.full_like(known, 0.5))


def picture_without_condition(latents, t, signal, known):
    both, at = imagedream.picture_as_last_frame(latents, t, signal, known)
    both[0, :, -1] = known
    return both, at


def noisy_picture(latents, t, signal, known):
    return imagedream.picture_as_last_frame(latents, t, signal, signal[:, 0].sqrt() * known)


def last_hidden_state(multiview: ImageDream) -> None:
    plain = multiview._image_encoder.forward

    def forward(*args, **kwargs):
        seen = plain(*args, **kwargs)
        return type(seen)(hidden_states=(*seen.hidden_states, seen.hidden_states[-1]))

    multiview._image_encoder.forward = forward


MISTAKES: dict[str, Callable[[ImageDream], object]] = {
    "frames in another order": lambda d: setattr(d, "_cameras", d._cameras[[3, 0, 1, 2, 4]]),
    "the picture's camera is the front's": lambda d: d._cameras[4].copy_(d._cameras[0]),
    "the picture's camera is one": lambda d: d._cameras[4].fill_(1.0),
    "nothing does not go through the resampler": lambda d: d._nothing.zero_(),
    "the picture's frame has something else": lambda d: setattr(d._sampler, "_frames", noise_in_the_last_frame),
    "the picture's frame without condition, too": lambda d: setattr(d._sampler, "_frames", picture_without_condition),
    "the picture's frame is noisy": lambda d: setattr(d._sampler, "_frames", noisy_picture),
    "CLIP's last layer": last_hidden_state,
    "guidance of another scale": lambda d: setattr(d, "_scale", 5.1),
    "latents that are not scaled": lambda d: d._vae.register_to_config(scaling_factor=0.2),
    "a grey backdrop": lambda d: setattr(d, "_backdrop", d._backdrop / 2),
    "time steps that begin at 0": lambda d: d._schedule.t.sub_(1),
    "all signal at the end": lambda d: d._schedule.signal_after[-1:].fill_(1.0),
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_sampling_is_seen(folder, mistake):
    multiview = loaded(folder)
    MISTAKES[mistake](multiview)
    assert not agrees(multiview, "imagedream_views", "", small_imagedream.cutout())


@pytest.mark.slow
def test_without_tokens_of_the_picture_it_is_seen(folder, monkeypatch):
    def words_alone(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs):
        words = encoder_hidden_states[:, : -self.image_tokens]
        return attention.MultiViewAttention.__call__(self, attn, hidden_states, words)

    monkeypatch.setattr(attention.ImagePromptAttention, "__call__", words_alone)
    assert not agrees(loaded(folder), "imagedream_views", "", small_imagedream.cutout())


# ---- files that are not ImageDream's ----


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("image_embed.layers.2.0.to_kv.weight", None, r"layers\.2\.attn\.to_k\.weight"),
        ("middle_block.1.transformer_blocks.0.attn2.to_v_ip.weight", None, r"mid_block.*attn2\.to_v_ip\.weight"),
        ("image_embed.latents", torch.zeros(1, 3, 24), "latents"),
        ("image_embed.layers.0.0.to_q.bias", torch.zeros(768), r"to_q\.bias"),
        ("image_embed.layers.0.2.weight", torch.zeros(1), r"no name of ImageDream's resampler"),
    ],
)
def test_wrong_weights_are_named(tmp_path, name, tensor, message):
    about = golden("imagedream_unet")[1]
    state = weights(about["shapes"])
    state.pop(name, None)
    if tensor is not None:
        state[name] = tensor
    with pytest.raises(WeightsError, match=rf"not a usable UNet.*{message}"):
        load_image_prompt_unet(write_unet(tmp_path, about["config"], state), torch.float32)


def test_mvdream_is_not_imagedream(tmp_path):
    about = golden("mvdream_unet")[1]
    with pytest.raises(WeightsError, match="ip_dim must be over 0"):
        load_image_prompt_unet(write_unet(tmp_path, about["config"], weights(about["shapes"])), torch.float32)


@pytest.mark.slow
def test_an_image_encoder_of_another_width_is_refused(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    small = CLIPVisionConfig(
        hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=56
    )
    CLIPVisionModel(small).save_pretrained(copy / "image_encoder")
    with pytest.raises(WeightsError, match="hidden_size is 32, must be 1280"):
        loaded(copy)


@pytest.mark.slow
def test_names_of_older_transformers_are_read(folder, tmp_path):
    """As the published file has them: a prefix more, and a buffer that is none any more."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "image_encoder" / "model.safetensors"
    state = {f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, path, {"format": "pt"})
    assert agrees(loaded(copy), "imagedream_views", "", small_imagedream.cutout())


@pytest.mark.slow
def test_downloaded_by_name_and_loaded_offline(folder, tmp_path, monkeypatch, no_network):
    # By another revision than the registry's, whose weights must be the published ones.
    entry = replace(REGISTRY["imagedream"], revision="d" * 40, sha256=())
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files |= {"unet/mv_unet.py": b"raise SystemExit", "README.md": b"#", "model_index.json": b"{}"}
    with serve({str(entry.repo): Repository(entry.revision, files)}) as hub:
        done = downloads.run(hub, tmp_path, "--only", "imagedream", "--revision", entry.revision)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert agrees(loaded(local_folder(entry)), "imagedream_views", "", small_imagedream.cutout())
