"""Run the authors' own code and ours on the same random weights, and say how far they are apart.

``.venv/bin/python -m scripts.tools.fidelity AUTHORS [--golden]`` wants a folder with checkouts of the public
repositories that docs/FIDELITY.md lists. Their code is imported from there and nothing of it is kept; packages that it
imports and the comparison does not use are stood in for. With ``--golden`` the small tensors in tests/golden are
written anew.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from generation.generators.dreamgaussian.guidance.zero123 import Zero123, camera_numbers, load_projection
from generation.generators.dreamgaussian.schedule import position_lr
from generation.generators.lgm.network import BIG, LGM, Config, plucker_rays, to_gaussians
from generation.generators.multiview import ImageDream, MVDreamViews, image_prompt
from generation.generators.multiview.attention import camera_embedding, join_views
from generation.generators.multiview.image_prompt import load_image_prompt_unet
from generation.schema.options import BackgroundModel
from generation.splats import ply
from generation.splats.cameras import orbit
from generation.stages.background import BackgroundRemover
from generation.weights.latent_diffusion import load_unet, rename_unet, unet_config
from scripts.tools import small_imagedream
from scripts.tools.golden_weights import GOLDEN, lgm_views, lgm_weights, pack, weights

LIMIT = 1e-4  # largest absolute difference, float32

MVDREAM: dict[str, Any] = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2,
    "attention_resolutions": [2, 1], "channel_mult": [1, 2, 2], "num_head_channels": 16, "transformer_depth": 1,
    "context_dim": 24, "camera_dim": 16,
}  # fmt: skip
ZERO123: dict[str, Any] = {
    "image_size": 8, "in_channels": 8, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2,
    "attention_resolutions": [2, 1], "channel_mult": [1, 2, 2], "num_heads": 2, "transformer_depth": 1,
    "context_dim": 24, "use_linear_in_transformer": False,
}  # fmt: skip
IMAGEDREAM = MVDREAM | {"ip_dim": 4}
# What the public checkpoint's config says, as its authors' conversion writes it.
MVDREAM_FULL = MVDREAM | {
    "image_size": 32, "model_channels": 320, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64, "context_dim": 1024,
}  # fmt: skip
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
ANGLES = [(-80.0, -170.0), (-30.0, 0.0), (0.0, 0.0), (0.0, 90.0), (15.0, 135.0), (45.0, -60.0), (79.0, 179.0)]


def attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """In place of xformers': (heads, length, width)."""
    return F.scaled_dot_product_attention(q, k, v)


@contextmanager
def borrowed(folder: Path, *stand_ins: str) -> Iterator[None]:
    """Imports come from ``folder`` first; what was imported inside, and the stand-ins, are forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    for name in stand_ins:
        sys.modules[name] = MagicMock(name=name)
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None) or ""
            if name in stand_ins or origin.startswith(str(folder)):
                del sys.modules[name]


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


class Comparison:
    """Collects differences and golden tensors."""

    def __init__(self, authors: Path, write: bool) -> None:
        self.authors, self.write = authors, write
        self.rows: list[tuple[str, float, float]] = []

    def add(self, what: str, theirs: Tensor, ours: Tensor) -> None:
        assert theirs.shape == ours.shape, (what, theirs.shape, ours.shape)
        self.rows.append((what, apart(theirs, ours), float(theirs.abs().max())))

    def golden(self, name: str, tensors: dict[str, Tensor], **about: object) -> None:
        if self.write:
            GOLDEN.mkdir(exist_ok=True)
            tensors = {key: tensor.detach().float().contiguous() for key, tensor in tensors.items()}
            path = GOLDEN / f"{name}.safetensors"
            save_file(tensors, path, {key: pack(value) for key, value in about.items()})

    # ---- one method a comparison ----

    @torch.no_grad()
    def mvdream(self) -> None:
        """Two scenes of four views with text and cameras; both published forms of the authors' UNet."""
        inputs = weights({"x": [8, 4, 8, 8], "text": [8, 5, 24]}, seed=1)
        cameras = camera_embedding(orbit(15.0, torch.arange(8) * 90.0 + 20.0, 2.5, 49.1, 8, 8).camera_to_world)
        t = torch.tensor([700] * 4 + [120] * 4)
        with borrowed(self.authors / "MVDream", "open_clip"):
            kind = importlib.import_module("mvdream.ldm.modules.diffusionmodules.openaimodel").MultiViewUNetModel
            theirs = kind(**MVDREAM, use_spatial_transformer=True, use_linear_in_transformer=True, legacy=False).eval()
            state = weights(shapes(theirs))
            theirs.load_state_dict(state)
            out = theirs(inputs["x"], t, context=inputs["text"], camera=cameras, num_frames=4)
        with borrowed(self.authors / "mvdream_diffusers", "xformers", "xformers.ops", "kiui", "kiui.cam"):
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
        self.add("MVDream UNet, 2 scenes of 4 views, text, cameras (bytedance/MVDream)", out, ours)
        self.add("the same (ashawkey/mvdream_diffusers, whose names the public weights have)", again, ours)
        tensors = {**inputs, "t": t, "cameras": cameras, "noise": out}
        self.golden("mvdream_unet", tensors, config=MVDREAM, shapes=shapes(theirs))

    def mvdream_names(self) -> None:
        """At full size: does every tensor of the authors' UNet have its place, of the same shape, and none is left?"""
        config = MVDREAM_FULL
        stand_ins = ("xformers", "xformers.ops", "kiui", "kiui.cam")
        with borrowed(self.authors / "mvdream_diffusers", *stand_ins), torch.device("meta"):
            theirs = importlib.import_module("mv_unet").MultiViewUNetModel(**config).state_dict()
        with torch.device("meta"):
            ours = UNet2DConditionModel(**unet_config(config)).state_dict()
        renamed = {name: tensor.shape for name, tensor in rename_unet(theirs, config["num_res_blocks"]).items()}
        differing = renamed.items() ^ {name: tensor.shape for name, tensor in ours.items()}.items()
        what = f"MVDream UNet at full size, {len(theirs)} tensors: names or shapes that differ"
        self.rows.append((what, float(len(differing)), float(sum(t.numel() for t in theirs.values()))))

    def mvdream_cameras(self) -> None:
        with borrowed(self.authors / "MVDream", "open_clip"):
            module = importlib.import_module("mvdream.camera_utils")
            theirs = module.get_camera(6, elevation=25, azimuth_start=10)
        ours = camera_embedding(orbit(25.0, 10.0 + 60.0 * torch.arange(6), 2.5, 49.1, 8, 8).camera_to_world)
        self.add("MVDream camera condition, 6 cameras", theirs.float(), ours)

    @torch.no_grad()
    def imagedream(self) -> None:
        """Two objects of four views and a picture; both published forms of the authors' UNet, resampler and all."""
        config = IMAGEDREAM
        inputs = weights(
            {"x": [2, 4, 4, 8, 8], "picture": [2, 4, 8, 8], "text": [2, 5, 24], "seen": [2, 9, 1280]}, seed=8
        )
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
        with self.pipeline_module():
            published = importlib.import_module("mv_unet").MultiViewUNetModel(**config).eval()
            state = weights(shapes(published))
            published.load_state_dict(small_imagedream.quiet(state))
            hushed = published(x.clone(), **each, ip_img=inputs["picture"].clone())
            published.load_state_dict(state)
            out = published(x.clone(), **each, ip_img=inputs["picture"].clone())
        stand_ins = ("open_clip", "omegaconf", "xformers", "xformers.ops")
        with borrowed(self.authors / "ImageDream" / "extern" / "ImageDream", *stand_ins):
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
        self.add(f"{what} (bytedance/ImageDream)", again, ours(state))
        self.add("the same (ashawkey/mvdream_diffusers, whose names the public weights have)", out, ours(state))
        self.add("the same with weights so small that epsilons matter", hushed, ours(small_imagedream.quiet(state)))
        tensors = {"t": t, "noise": out, "hushed": hushed}
        self.golden("imagedream_unet", tensors, config=config, shapes=shapes(published))

    def imagedream_names(self) -> None:
        """At full size, and whether that makes a file of the published size, 1,883,435,904 bytes."""
        config = MVDREAM_FULL | {"ip_dim": 16}
        with self.pipeline_module(), torch.device("meta"):
            theirs = importlib.import_module("mv_unet").MultiViewUNetModel(**config).state_dict()
        with torch.device("meta"):
            unet, resampler = image_prompt.build(config)
        renamed = image_prompt.rename(theirs, config["num_res_blocks"])
        differing = 0
        for half, model in zip(renamed, (unet, resampler), strict=True):
            ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
            differing += len({name: tensor.shape for name, tensor in half.items()}.items() ^ ours.items())
        what = f"ImageDream UNet and resampler at full size, {len(theirs)} tensors: names or shapes that differ"
        self.rows.append((what, float(differing), float(sum(t.numel() for t in theirs.values()))))

    def views(self) -> None:
        """One whole sampling of 5 steps by the authors' pipeline, from the same noise, through a folder that it saved.

        It draws the latents of the picture and the noise of the views; here it is given ours, and for the picture's own
        frame, whose noise it overwrites, something else.
        """
        self._views("imagedream", ImageDream, IMAGEDREAM, "", small_imagedream.cutout(), 5.0)
        self._views("mvdream", MVDreamViews, MVDREAM, "a red cube, 3d asset", None, 7.5)

    @torch.no_grad()
    def _views(
        self, name: str, kind: type[Any], config: dict[str, object], words: str, cutout: Tensor | None, scale: float
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        of_picture = torch.zeros(0) if cutout is None else torch.randn(4, 8, 8, generator=generator)
        noise = torch.randn(4, 4, 8, 8, generator=generator)[[3, 0, 1, 2]]  # their second view is our first
        picture = None
        if cutout is not None:
            noise = torch.cat([noise, torch.full((1, 4, 8, 8), 9.0)])
            picture = (cutout[:3] * cutout[3:] + 1 - cutout[3:]).permute(1, 2, 0).numpy()
        posterior = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
        with tempfile.TemporaryDirectory() as place, self.pipeline_module():
            folder = small_imagedream.write(Path(place), 24, picture=cutout is not None)
            pipe = self._pipeline(folder, config, cutout is not None)
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
        self.add(f"{what}: latents of 4 views (ashawkey/mvdream_diffusers)", latents[[1, 2, 3, 0]], sampling.latents)
        self.add(f"{what}: the views of 256 pixels, in LGM's order", views, multiview.views([sampling])[0])
        tensors = {"latents": latents[[1, 2, 3, 0]], "small": F.avg_pool2d(views, 16)}
        self.golden(f"{name}_views", tensors, config=config, shapes=shapes(pipe.unet))

    @contextmanager
    def pipeline_module(self) -> Iterator[None]:
        """The authors' unified pipeline can be imported inside, with their own cameras."""
        unused = ("cv2", "lazy_loader", "xformers", "xformers.ops")
        with borrowed(self.authors / "mvdream_diffusers", *unused), borrowed(self.authors / "kiui"):
            sys.modules["lazy_loader"].attach.return_value = (None, list, [])
            module = importlib.import_module("mv_unet")
            module.xformers.ops.memory_efficient_attention = attention
            yield

    def _pipeline(self, folder: Path, config: dict[str, object], picture: bool) -> Any:
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

    def cameras(self) -> None:
        """Angles with the authors' sign of elevation: negative looks down."""
        with borrowed(self.authors / "dreamgaussian", "scipy", "scipy.spatial", "scipy.spatial.transform"):
            module = importlib.import_module("cam_utils")
            theirs = torch.stack([torch.from_numpy(module.orbit_camera(e, a, 2.0)) for e, a in ANGLES])
            focal = module.OrbitCamera(256, 256, r=2.0, fovy=49.1).intrinsics
        elevations, azimuths = (torch.tensor(column) for column in zip(*ANGLES, strict=True))
        ours = orbit(-elevations, azimuths, 2.0, 49.1, 256, 256)
        self.add(f"DreamGaussian orbit cameras, {len(ANGLES)} poses", theirs, ours.camera_to_world)
        K = ours.Ks[0]
        self.add(
            "their focal lengths and centre", torch.from_numpy(focal), torch.stack([K[0, 0], K[1, 1], K[0, 2], K[1, 2]])
        )
        self.golden("orbit", {"angles": torch.tensor(ANGLES), "poses": theirs})

    def learning_rates(self) -> None:
        unused = ("diff_gaussian_rasterization", "simple_knn", "simple_knn._C", "mesh", "mesh_utils", "kiui")
        with borrowed(self.authors / "dreamgaussian", *unused):
            make = importlib.import_module("gs_renderer").get_expon_lr_func
            schedule = make(lr_init=0.001, lr_final=0.00002, lr_delay_mult=0.02, max_steps=300)
            theirs = torch.tensor([schedule(step) for step in range(1, 501)])
        ours = torch.tensor([position_lr(step, 0.001, 0.00002, 300) for step in range(1, 501)])
        self.add("DreamGaussian learning rate of positions, 500 steps", theirs, ours)
        self.golden("learning_rate", {"rates": theirs[::20]})

    @torch.no_grad()
    def zero123_unet(self) -> None:
        """The first authors' UNet and projection, in their own checkpoint's layout."""
        inputs = weights({"x": [3, 4, 8, 8], "view": [3, 4, 8, 8], "clip": [3, 24], "camera": [3, 4]}, seed=2)
        t = torch.tensor([900, 400, 30])
        with borrowed(self.authors / "zero123" / "zero123", "cv2", "carvekit", "carvekit.api", "carvekit.api.high"):
            kind = importlib.import_module("ldm.modules.diffusionmodules.openaimodel").UNetModel
            config = {key: value for key, value in ZERO123.items() if key != "use_linear_in_transformer"}
            theirs = kind(**config, use_spatial_transformer=True, legacy=False).eval()
            state = weights(shapes(theirs))
            theirs.load_state_dict(state)
            projection = torch.nn.Linear(28, 24)
            mixing = weights(shapes(projection), seed=3)
            projection.load_state_dict(mixing)
            words = projection(torch.cat([inputs["clip"], inputs["camera"]], 1))[:, None]
            out = theirs(torch.cat([inputs["x"], inputs["view"]], 1), t, context=words)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for part in ("unet", "cc_projection"):
                (folder / part).mkdir()
            (folder / "unet" / "config.json").write_text(json.dumps(ZERO123))
            save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
            renamed = {f"projection.{key}": tensor for key, tensor in mixing.items()}
            save_file(renamed, folder / "cc_projection" / "diffusion_pytorch_model.safetensors")
            unet, layer = load_unet(folder / "unet", torch.float32).eval(), load_projection(folder, 24)
        words = layer(torch.cat([inputs["clip"], inputs["camera"]], 1))[:, None]
        ours = unet(torch.cat([inputs["x"], inputs["view"]], 1), t, words).sample
        self.add("Zero123 UNet with projection, 3 views (cvlab-columbia/zero123)", out, ours)
        about = {"config": ZERO123, "shapes": shapes(theirs), "projection": shapes(projection)}
        self.golden("zero123_unet", {**inputs, "t": t, "noise": out}, **about)

    def zero123_guidance(self) -> None:
        """DreamGaussian's guidance step from its own pipeline's saved folder, for both models, with gradients.

        Of the latents of images it draws a sample and we take the mean: here it takes the mean too.
        """
        with (
            tempfile.TemporaryDirectory() as name,
            borrowed(self.authors / "dreamgaussian"),
            patch("diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample", lambda self: self.mode()),
        ):
            module = importlib.import_module("zero123")
            guidance = importlib.import_module("guidance.zero123_utils")
            for stable in (False, True):
                folder = Path(name) / ("stable" if stable else "xl")
                pipe = small_zero123(module)
                pipe.to(torch.float16).save_pretrained(folder)
                pipe.to(torch.float32)
                with patch.object(module.Zero123Pipeline, "from_pretrained", return_value=pipe):
                    theirs = guidance.Zero123("cpu", model_key=str(folder))
                theirs.dtype = torch.float32
                self._zero123_step(theirs, Zero123.load(folder, "cpu", torch.float32, stable), stable)

    def _zero123_step(self, theirs: ModuleType, ours: Zero123, stable: bool) -> None:
        name = "stable-zero123" if stable else "zero123-xl"
        reference, draws = -20.0, [(10, 35), (-25, -120)]  # degrees, the authors' sign; relative to the reference
        elevations, azimuths = (list(column) for column in zip(*draws, strict=True))
        poses = orbit(
            -reference - torch.tensor(elevations), torch.tensor(azimuths), 2.0, 49.1, 8, 8
        ).camera_to_world  # fmt: skip
        numbers = theirs.get_cam_embeddings(elevations, azimuths, [0, 0], reference)[:, 0]
        self.add(
            f"{name}: numbers of 2 cameras", numbers, camera_numbers(poses, torch.tensor([-reference] * 2), stable)
        )
        angles = torch.tensor(draws, dtype=torch.float32)
        self.golden(f"{name}_cameras", {"angles": angles, "numbers": numbers, "reference": torch.tensor(reference)})
        image = weights({"image": [3, 64, 64]}, seed=4)["image"].sigmoid()
        cutout = torch.cat([image, torch.ones(1, 64, 64)])
        theirs.get_img_embeds(image[None])
        condition = ours.prepare(cutout, -reference)
        embedding, latents = theirs.embeddings
        self.add(f"{name}: embedding and latents of the known view",
                 torch.cat([embedding.flatten(), latents.flatten()]), condition[1:])  # fmt: skip
        renders = weights({"renders": [2, 3, 40, 40]}, seed=5)["renders"].sigmoid()
        results = []
        for run in ("theirs", "ours"):
            pixels = renders.clone().requires_grad_(True)
            generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            if run == "theirs":
                noise = torch.cat([torch.randn(1, 4, 32, 32, generator=g) for g in generators])
                with patch("torch.randn_like", return_value=noise):
                    loss = theirs.train_step(
                        pixels, elevations, azimuths, [0, 0], step_ratio=0.4, default_elevation=-20
                    )
            else:
                loss = ours.loss(
                    partial(torch.clone, pixels),
                    poses,
                    torch.stack([condition] * 2),
                    torch.tensor([0.6] * 2),
                    generators,
                    5.0,
                ).sum()
            loss.backward()
            assert pixels.grad is not None
            results.append((loss.detach(), pixels.grad))
        (their_loss, their_grad), (our_loss, our_grad) = results
        self.add(f"{name}: loss of one step, relative", torch.ones(()), our_loss / their_loss)
        scale = their_grad.abs().max()
        self.add(f"{name}: its gradient by the pixels, relative", their_grad / scale, our_grad / scale)

    @torch.no_grad()
    def birefnet(self) -> None:
        """The published modelling file through our loader, against the authors' repository, with the smallest Swin."""
        image = weights({"x": [1, 3, 256, 256]}, seed=6)["x"].sigmoid()
        with (
            tempfile.TemporaryDirectory() as name,
            borrowed(self.authors / "BiRefNet", "cv2", "dataset", "utils"),
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
            folder = self._published(Path(name), theirs.state_dict())
            ours = BackgroundRemover.load(folder, BackgroundModel(model="./", image_size=256), "cpu")
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            out = theirs((image - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))[-1].sigmoid()
        self.add("BiRefNet, alpha of 256 x 256 pixels", out, ours.remove(image))

    @contextmanager
    def _lgm_code(self) -> Iterator[ModuleType]:
        with borrowed(self.authors / "LGM", *LGM_UNUSED), borrowed(self.authors / "kiui"):
            sys.modules["lazy_loader"].attach.return_value = (None, list, [])
            models = importlib.import_module("core.models")
            with patch.object(models, "GaussianRenderer", MagicMock()):  # its constructor wants a GPU
                yield models

    @torch.no_grad()
    def lgm(self) -> None:
        """Two objects of four views, at a size that is not the network's; then one of them as the authors' PLY."""
        c = LGM_SMALL
        options = SimpleNamespace(
            input_size=c.input_size, splat_size=c.splat_size, fovy=c.fovy, cam_radius=c.radius, lambda_lpips=0.0,
            down_channels=c.down_channels, down_attention=c.down_attention, mid_attention=True,
            up_channels=c.up_channels, up_attention=c.up_attention,
        )  # fmt: skip
        images = lgm_views()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with self._lgm_code() as models, tempfile.TemporaryDirectory() as name:
            theirs = models.LGM(options).eval()
            state = lgm_weights(shapes(theirs))
            theirs.load_state_dict(state)
            rays = theirs.prepare_default_rays("cpu")
            raised = theirs.prepare_default_rays("cpu", elevation=-20)
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
            folder = Path(name)
            save_file(state, folder / "model_fp16_fixrot.safetensors")
            (folder / "config.json").write_text(json.dumps(vars(c)))
            ours = LGM.load(folder, "cpu", torch.float32)
        self.add("LGM: Plücker rays of its four cameras", rays, ours.rays())
        above = orbit(20.0, torch.tensor([0.0, 90, 180, 270]), c.radius, c.fovy, 32, 32).camera_to_world
        self.add("the same, 20 degrees above the object", raised, plucker_rays(above, 32, c.fovy))
        our_maps = ours.unet(given.flatten(0, 1), 4)
        self.add("LGM's UNet, 2 objects of 4 views (3DTopia/LGM)", maps, our_maps)
        ours_splats = ours(images, ours.rays())
        for part, columns in LGM_PARTS.items():
            spread = float(splats[..., columns].std())
            what = f"LGM: {part} of {splats.shape[1]} Gaussians (their standard deviation: {spread:.2g})"
            self.add(what, splats[..., columns], ours_splats[..., columns])
        mine = to_gaussians(ours_splats[0])
        for field, value in saved.tensors().items():
            self.add(f"LGM's PLY: {field} of {len(saved)} Gaussians", value, mine.tensors()[field])
        tensors = {"rays": rays[:, :, ::8, ::8], "raised": raised[:, :, ::8, ::8], "splats": splats[:, ::8]}
        self.golden("lgm", tensors, config=vars(c), shapes=shapes(theirs))

    def lgm_names(self) -> None:
        """At full size, as for MVDream."""
        with self._lgm_code() as models, torch.device("meta"):
            big = importlib.import_module("core.options").config_defaults["big"]
            big.lambda_lpips = 0.0
            theirs = models.LGM(big).state_dict()
            ours = LGM(BIG).state_dict()
        differing = {k: v.shape for k, v in theirs.items()}.items() ^ {k: v.shape for k, v in ours.items()}.items()
        count = sum(t.numel() for t in theirs.values())
        what = f"LGM big at full size, {len(theirs)} tensors, {count:,} numbers: names or shapes that differ"
        self.rows.append((what, float(len(differing)), float(count)))

    def _published(self, folder: Path, state: dict[str, Tensor]) -> Path:
        """A folder as on the hub: the modelling files, made smaller by one number, and weights."""
        source = self.authors / "RMBG-2.0"
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


def small_zero123(module: ModuleType) -> Any:
    """The authors' pipeline around small random models."""
    torch.manual_seed(0)
    return module.Zero123Pipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, sample_size=256,
        ),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                             image_size=224, patch_size=32, projection_dim=24)
        ),
        unet=UNet2DConditionModel(
            sample_size=32, in_channels=8, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2, cross_attention_dim=24, norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
        clip_camera_projection=module.CLIPCameraProjection(embedding_dim=24),
        requires_safety_checker=False,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("authors", type=Path, help="folder with the checkouts")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these comparisons alone: lgm, lgm_names, ...")
    parser.add_argument("--golden", action="store_true", help="write tests/golden anew")
    arguments = parser.parse_args()
    comparison = Comparison(arguments.authors.resolve(), arguments.golden)
    checks: list[Callable[[], None]] = [
        comparison.mvdream, comparison.mvdream_names, comparison.mvdream_cameras, comparison.imagedream,
        comparison.imagedream_names, comparison.views, comparison.zero123_unet,
        comparison.zero123_guidance, comparison.birefnet, comparison.cameras, comparison.learning_rates,
        comparison.lgm, comparison.lgm_names,
    ]  # fmt: skip
    for check in checks:
        if not arguments.only or check.__name__ in arguments.only:
            check()
    print("| what | largest difference | largest value |\n|---|---|---|")
    for what, difference, largest in comparison.rows:
        print(f"| {what} | {difference:.1e} | {largest:.3g} |")
    worst = max(difference for _, difference, _ in comparison.rows)
    print(f"\nlimit {LIMIT:.0e}: {'all within it' if worst < LIMIT else 'NOT within it'}")
    return 0 if worst < LIMIT and math.isfinite(worst) else 1


if __name__ == "__main__":
    np.random.seed(0)
    sys.exit(main())
