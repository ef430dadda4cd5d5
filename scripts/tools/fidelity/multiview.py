"""MVDream's and ImageDream's UNets, cameras and sampling."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModel,
)

from generation.generators.multiview import ImageDream, MVDreamViews, image_prompt
from generation.generators.multiview.attention import camera_embedding, join_views
from generation.generators.multiview.image_prompt import load_image_prompt_unet
from generation.splats.cameras import orbit
from generation.weights.latent_diffusion import load_unet, rename_unet, unet_config
from scripts.tools import small_imagedream
from scripts.tools.fidelity.comparison import Comparison, borrowed, shapes
from scripts.tools.golden_weights import weights

MVDREAM: dict[str, Any] = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2,
    "attention_resolutions": [2, 1], "channel_mult": [1, 2, 2], "num_head_channels": 16, "transformer_depth": 1,
    "context_dim": 24, "camera_dim": 16,
}  # fmt: skip

IMAGEDREAM = MVDREAM | {"ip_dim": 4}

# What the public checkpoint's config says, as its authors' conversion writes it.
MVDREAM_FULL = MVDREAM | {
    "image_size": 32, "model_channels": 320, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64, "context_dim": 1024,
}  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """In place of xformers': (heads, length, width)."""
    return F.scaled_dot_product_attention(q, k, v)


@torch.no_grad()
def mvdream(comparison: Comparison) -> None:
    """Two scenes of four views with text and cameras; both published forms of the authors' UNet."""
    inputs = weights({"x": [8, 4, 8, 8], "text": [8, 5, 24]}, seed=1)
    cameras = camera_embedding(orbit(15.0, torch.arange(8) * 90.0 + 20.0, 2.5, 49.1, 8, 8).camera_to_world)
    t = torch.tensor([700] * 4 + [120] * 4)
    with borrowed(comparison.authors / "MVDream", "open_clip"):
        kind = importlib.import_module("mvdream.ldm.modules.diffusionmodules.openaimodel").MultiViewUNetModel
        theirs = kind(**MVDREAM, use_spatial_transformer=True, use_linear_in_transformer=True, legacy=False).eval()
        state = weights(shapes(theirs))
        theirs.load_state_dict(state)
        out = theirs(inputs["x"], t, context=inputs["text"], camera=cameras, num_frames=4)
    with borrowed(comparison.authors / "mvdream_diffusers", "xformers", "xformers.ops", "kiui", "kiui.cam"):
        module = importlib.import_module("mv_unet")
        module.xformers.ops.memory_efficient_attention = attention
        published = module.MultiViewUNetModel(**MVDREAM).eval()
        published.load_state_dict(state)
        again = published(inputs["x"], t, context=inputs["text"], camera=cameras, num_frames=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({"_class_name": "MultiViewUNetModel", **MVDREAM}))
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        unet = load_unet(folder, torch.float32).eval()
    join_views(unet, 4)
    ours = unet(inputs["x"], t, inputs["text"], class_labels=cameras).sample
    comparison.add("MVDream UNet, 2 scenes of 4 views, text, cameras (bytedance/MVDream)", out, ours)
    comparison.add("the same (ashawkey/mvdream_diffusers, whose names the public weights have)", again, ours)
    tensors = {**inputs, "t": t, "cameras": cameras, "noise": out}
    comparison.golden("mvdream_unet", tensors, config=MVDREAM, shapes=shapes(theirs))


def mvdream_names(comparison: Comparison) -> None:
    """At full size: does every tensor of the authors' UNet have its place, of the same shape, and none is left?"""
    config = MVDREAM_FULL
    stand_ins = ("xformers", "xformers.ops", "kiui", "kiui.cam")
    with borrowed(comparison.authors / "mvdream_diffusers", *stand_ins), torch.device("meta"):
        theirs = importlib.import_module("mv_unet").MultiViewUNetModel(**config).state_dict()
    with torch.device("meta"):
        ours = UNet2DConditionModel(**unet_config(config)).state_dict()
    renamed = {name: tensor.shape for name, tensor in rename_unet(theirs, config["num_res_blocks"]).items()}
    differing = renamed.items() ^ {name: tensor.shape for name, tensor in ours.items()}.items()
    what = f"MVDream UNet at full size, {len(theirs)} tensors: names or shapes that differ"
    comparison.count(what, len(differing), float(sum(t.numel() for t in theirs.values())))


def mvdream_cameras(comparison: Comparison) -> None:
    with borrowed(comparison.authors / "MVDream", "open_clip"):
        module = importlib.import_module("mvdream.camera_utils")
        theirs = module.get_camera(6, elevation=25, azimuth_start=10)
    ours = camera_embedding(orbit(25.0, 10.0 + 60.0 * torch.arange(6), 2.5, 49.1, 8, 8).camera_to_world)
    comparison.add("MVDream camera condition, 6 cameras", theirs.float(), ours)


@torch.no_grad()
def imagedream(comparison: Comparison) -> None:
    """Two objects of four views and a picture; both published forms of the authors' UNet, resampler and all."""
    config = IMAGEDREAM
    inputs = weights({"x": [2, 4, 4, 8, 8], "picture": [2, 4, 8, 8], "text": [2, 5, 24], "seen": [2, 9, 1280]}, seed=8)
    t = torch.tensor([700, 120])
    cameras = camera_embedding(orbit(0.0, torch.arange(4) * 90.0, 1.0, 49.1, 8, 8).camera_to_world)
    each = {
        "timesteps": t.repeat_interleave(5),
        "context": inputs["text"].repeat_interleave(5, 0),
        "camera": F.pad(cameras, (0, 0, 0, 1)).repeat(2, 1),
        "num_frames": 5,
        "ip": inputs["seen"].repeat_interleave(5, 0),
    }
    # The fifth frame of x is overwritten by theirs.
    x = torch.cat([inputs["x"], torch.full((2, 1, 4, 8, 8), 9.0)], 1).flatten(0, 1)
    with pipeline_module(comparison):
        published = importlib.import_module("mv_unet").MultiViewUNetModel(**config).eval()
        state = weights(shapes(published))
        published.load_state_dict(small_imagedream.quiet(state))
        hushed = published(x.clone(), **each, ip_img=inputs["picture"].clone())
        published.load_state_dict(state)
        out = published(x.clone(), **each, ip_img=inputs["picture"].clone())
    stand_ins = ("open_clip", "omegaconf", "xformers", "xformers.ops")
    with borrowed(comparison.authors / "ImageDream" / "extern" / "ImageDream", *stand_ins):
        layers = importlib.import_module("imagedream.ldm.modules.attention")
        layers.xformers.ops.memory_efficient_attention = attention
        module = "imagedream.ldm.modules.diffusionmodules.openaimodel"
        kind = importlib.import_module(module).MultiViewUNetModel
        first = kind(
            **config, use_spatial_transformer=True, use_linear_in_transformer=True, legacy=False, with_ip=True,
            ip_mode="local_resample",
        ).eval()  # fmt: skip
        first.load_state_dict(state)
        again = first(x.clone(), **each, ip_img=inputs["picture"].clone())
    frames = torch.cat([inputs["x"], inputs["picture"][:, None]], 1).flatten(0, 1)

    def ours(state: dict[str, Tensor]) -> Tensor:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps({"_class_name": "MultiViewUNetModel", **config}))
            save_file(state, folder / "diffusion_pytorch_model.safetensors")
            unet, resampler = load_image_prompt_unet(folder, torch.float32)
        join_views(unet.eval(), 5, shared_text=True, image_tokens=4)
        told = torch.cat([inputs["text"], resampler(inputs["seen"])], 1)
        noise: Tensor = unet(frames, each["timesteps"], told, class_labels=each["camera"]).sample
        return noise

    what = "ImageDream UNet with resampler, 2 objects of 4 views and a picture"
    comparison.add(f"{what} (bytedance/ImageDream)", again, ours(state))
    comparison.add("the same (ashawkey/mvdream_diffusers, whose names the public weights have)", out, ours(state))
    comparison.add("the same with weights so small that epsilons matter", hushed, ours(small_imagedream.quiet(state)))
    tensors = {"t": t, "noise": out, "hushed": hushed}
    comparison.golden("imagedream_unet", tensors, config=config, shapes=shapes(published))


def imagedream_names(comparison: Comparison) -> None:
    """At full size, and whether that makes a file of the published size, 1,883,435,904 bytes."""
    config = MVDREAM_FULL | {"ip_dim": 16}
    with pipeline_module(comparison), torch.device("meta"):
        theirs = importlib.import_module("mv_unet").MultiViewUNetModel(**config).state_dict()
    with torch.device("meta"):
        unet, resampler = image_prompt.build(config)
    renamed = image_prompt.rename(theirs, config["num_res_blocks"])
    differing = 0
    for half, model in zip(renamed, (unet, resampler), strict=True):
        ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
        differing += len({name: tensor.shape for name, tensor in half.items()}.items() ^ ours.items())
    what = f"ImageDream UNet and resampler at full size, {len(theirs)} tensors: names or shapes that differ"
    comparison.count(what, differing, float(sum(t.numel() for t in theirs.values())))


def views(comparison: Comparison) -> None:
    """One whole sampling of 5 steps by the authors' pipeline, from the same noise, through a folder that it saved.

    It draws the latents of the picture and the noise of the views; here it is given ours, and for the picture's own
    frame, whose noise it overwrites, something else.
    """
    _views(comparison, "imagedream", ImageDream, IMAGEDREAM, "", small_imagedream.cutout(), 5.0)
    _views(comparison, "mvdream", MVDreamViews, MVDREAM, "a red cube, 3d asset", None, 7.5)


@torch.no_grad()
def _views(
    comparison: Comparison,
    name: str,
    kind: type[Any],
    config: dict[str, object],
    words: str,
    cutout: Tensor | None,
    scale: float,
) -> None:
    generator = torch.Generator().manual_seed(5)
    of_picture = torch.zeros(0) if cutout is None else torch.randn(4, 8, 8, generator=generator)
    noise = torch.randn(4, 4, 8, 8, generator=generator)[[3, 0, 1, 2]]  # their second view is our first
    picture = None
    if cutout is not None:
        noise = torch.cat([noise, torch.full((1, 4, 8, 8), 9.0)])
        picture = (cutout[:3] * cutout[3:] + 1 - cutout[3:]).permute(1, 2, 0).numpy()
    posterior = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
    with tempfile.TemporaryDirectory() as place, pipeline_module(comparison):
        folder = small_imagedream.write(Path(place), 24, picture=cutout is not None)
        pipe = _pipeline(folder, config, cutout is not None)
        pipe.save_pretrained(folder)
        with (
            patch.object(sys.modules["pipeline_mvdream"], "randn_tensor", lambda *_, **__: noise.clone()),
            patch(posterior, lambda self: self.mean + self.std * of_picture),
        ):
            latents, images = (
                pipe(
                    words, picture, guidance_scale=scale, num_inference_steps=5, elevation=0,
                    device=torch.device("cpu"), output_type=wanted,
                )
                for wanted in ("latent", "numpy")
            )  # fmt: skip
        multiview = kind.load(folder, "cpu", torch.float32, front_azimuth=90.0, steps=5, guidance_scale=scale)
    views = torch.from_numpy(images)[[1, 2, 3, 0]].permute(0, 3, 1, 2)  # as LGM's infer.py puts them
    (sampling,) = multiview.begin([words], [cutout], [5])
    while not sampling.done:
        multiview.step([sampling])
    what = f"{kind.__name__}, 5 steps"
    comparison.add(f"{what}: latents of 4 views (ashawkey/mvdream_diffusers)", latents[[1, 2, 3, 0]], sampling.latents)
    comparison.add(f"{what}: the views of 256 pixels, in LGM's order", views, multiview.views([sampling])[0])
    tensors = {"latents": latents[[1, 2, 3, 0]], "small": F.avg_pool2d(views, 16)}
    comparison.golden(f"{name}_views", tensors, config=config, shapes=shapes(pipe.unet))


@contextmanager
def pipeline_module(comparison: Comparison) -> Iterator[None]:
    """The authors' unified pipeline can be imported inside, with their own cameras."""
    unused = ("cv2", "lazy_loader", "xformers", "xformers.ops")
    with borrowed(comparison.authors / "mvdream_diffusers", *unused), borrowed(comparison.authors / "kiui"):
        sys.modules["lazy_loader"].attach.return_value = (None, list, [])
        module = importlib.import_module("mv_unet")
        module.xformers.ops.memory_efficient_attention = attention
        yield


def _pipeline(folder: Path, config: dict[str, object], picture: bool) -> Any:
    module = importlib.import_module("pipeline_mvdream")
    unet = importlib.import_module("mv_unet").MultiViewUNetModel(**config)
    unet.register_to_config(**config)
    unet.load_state_dict(small_imagedream.unet_weights(shapes(unet)))
    seen = {"feature_extractor": None, "image_encoder": None}
    if picture:
        seen = {
            "feature_extractor": CLIPImageProcessor.from_pretrained(folder / "feature_extractor"),
            "image_encoder": CLIPVisionModel.from_pretrained(folder / "image_encoder"),
        }
    pipe = module.MVDreamPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        unet=unet,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        scheduler=small_imagedream.scheduler(),
        **seen,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
