"""Zero123's UNet, projection and guidance."""

from __future__ import annotations

import importlib
import json
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from generation.generators.dreamgaussian.guidance.zero123 import Zero123, camera_numbers, load_projection
from generation.splats.cameras import orbit
from generation.weights.latent_diffusion import load_unet
from scripts.tools.fidelity.comparison import Comparison, borrowed, shapes
from scripts.tools.golden_weights import weights

ZERO123: dict[str, Any] = {
    "image_size": 8, "in_channels": 8, "out_channels": 4, "model_channels": 32, "num_res_blocks": 2,
    "attention_resolutions": [2, 1], "channel_mult": [1, 2, 2], "num_heads": 2, "transformer_depth": 1,
    "context_dim": 24, "use_linear_in_transformer": False,
}  # fmt: skip


@torch.no_grad()
def zero123_unet(comparison: Comparison) -> None:
    """The first authors' UNet and projection, in their own checkpoint's layout."""
    inputs = weights({"x": [3, 4, 8, 8], "view": [3, 4, 8, 8], "clip": [3, 24], "camera": [3, 4]}, seed=2)
    t = torch.tensor([900, 400, 30])
    with borrowed(comparison.authors / "zero123" / "zero123", "cv2", "carvekit", "carvekit.api", "carvekit.api.high"):
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
    comparison.add("Zero123 UNet with projection, 3 views (cvlab-columbia/zero123)", out, ours)
    about = {"config": ZERO123, "shapes": shapes(theirs), "projection": shapes(projection)}
    comparison.golden("zero123_unet", {**inputs, "t": t, "noise": out}, **about)


def zero123_guidance(comparison: Comparison) -> None:
    """DreamGaussian's guidance step from its own pipeline's saved folder, for both models, with gradients.

    Of the latents of images it draws a sample and we take the mean: here it takes the mean too.
    """
    with (
        tempfile.TemporaryDirectory() as name,
        borrowed(comparison.authors / "dreamgaussian"),
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
            _zero123_step(comparison, theirs, Zero123.load(folder, "cpu", torch.float32, stable), stable)


def _zero123_step(comparison: Comparison, theirs: ModuleType, ours: Zero123, stable: bool) -> None:
    name = "stable-zero123" if stable else "zero123-xl"
    reference, draws = -20.0, [(10, 35), (-25, -120)]  # degrees, the authors' sign; relative to the reference
    elevations, azimuths = (list(column) for column in zip(*draws, strict=True))
    poses = orbit(
        -reference - torch.tensor(elevations), torch.tensor(azimuths), 2.0, 49.1, 8, 8
    ).camera_to_world  # fmt: skip
    numbers = theirs.get_cam_embeddings(elevations, azimuths, [0, 0], reference)[:, 0]
    comparison.add(
        f"{name}: numbers of 2 cameras", numbers, camera_numbers(poses, torch.tensor([-reference] * 2), stable)
    )
    angles = torch.tensor(draws, dtype=torch.float32)
    comparison.golden(f"{name}_cameras", {"angles": angles, "numbers": numbers, "reference": torch.tensor(reference)})
    image = weights({"image": [3, 64, 64]}, seed=4)["image"].sigmoid()
    cutout = torch.cat([image, torch.ones(1, 64, 64)])
    theirs.get_img_embeds(image[None])
    condition = ours.prepare(cutout, -reference)
    embedding, latents = theirs.embeddings
    comparison.add(f"{name}: embedding and latents of the known view",
             torch.cat([embedding.flatten(), latents.flatten()]), condition[1:])  # fmt: skip
    renders = weights({"renders": [2, 3, 40, 40]}, seed=5)["renders"].sigmoid()
    results = []
    for run in ("theirs", "ours"):
        pixels = renders.clone().requires_grad_(True)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        if run == "theirs":
            noise = torch.cat([torch.randn(1, 4, 32, 32, generator=g) for g in generators])
            with patch("torch.randn_like", return_value=noise):
                loss = theirs.train_step(pixels, elevations, azimuths, [0, 0], step_ratio=0.4, default_elevation=-20)
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
    comparison.add(f"{name}: loss of one step, relative", torch.ones(()), our_loss / their_loss)
    scale = their_grad.abs().max()
    comparison.add(f"{name}: its gradient by the pixels, relative", their_grad / scale, our_grad / scale)


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
