"""The full profile's models at their true size, with random weights: for measuring speed and memory, which do not
depend on what the weights say. ``load`` stands in for ``generation.pipeline.assemble.load``.

The matting net's code comes with its weights: the environment variable MATTING_CODE names a folder with RMBG-2.0's or
BiRefNet's ``config.json`` and modelling file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from torchmetrics.functional.image.lpips import _NoTrainLpips
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from generation.accelerate.quantise import quantise_linears
from generation.generators.base import Checkpoint, Parts, RemoveBackground
from generation.generators.dreamgaussian.guidance.mvdream import MVDream
from generation.generators.dreamgaussian.guidance.zero123 import CAMERA_NUMBERS, Zero123
from generation.generators.kinds import load_models, load_options
from generation.generators.lgm.network import BIG, LGM
from generation.generators.multiview import ImageDream, MVDreamViews, image_prompt
from generation.generators.multiview.text_encoder import TextEncoder
from generation.generators.trellis.condition import Condition
from generation.generators.trellis.weights import Networks
from generation.pipeline.assemble import load_generators
from generation.pipeline.pipeline import Pipeline
from generation.pipeline.warm_up import warm_up
from generation.schema.memory_class import Quantization, choose
from generation.schema.options import Models
from generation.settings import PROFILES, ROOT, Settings, gpu_memory
from generation.stages.background import BackgroundRemover
from generation.stages.self_check import ImageClip, Lpips, Quality, QualityNet, SelfCheck, TextClip
from generation.stages.self_check.quality import DINOV2_SMALL
from generation.stages.text_to_image import TextToImage
from generation.weights.latent_diffusion import unet_config
from generation.weights.registry import REGISTRY, lookup
from scripts.bench import trellis_sizes

TINY = Path(__file__).resolve().parents[2] / "generation" / "weights" / "tiny"

# MVDream's UNet, in its authors' words: Stable Diffusion 2.1's with cameras.
MVDREAM_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_head_channels": 64, "context_dim": 1024, "camera_dim": 16,
}  # fmt: skip


@contextmanager
def on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Models built inside are drawn right there, in that type, from a set seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def flux(
    device: str,
    quantization: Quantization = "none",
    dtype: torch.dtype = torch.bfloat16,
    quantization_t5: Quantization | None = None,
) -> FluxPipeline:
    """FLUX.1-schnell: 11.9 billion parameters, T5-XXL's encoder with 4.8 and CLIP-L's with 0.12."""
    with on("meta", dtype):
        transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=False,
        )  # fmt: skip
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu", is_encoder_decoder=False,
            )
        )  # fmt: skip
    _draw(transformer, [*transformer.transformer_blocks, *transformer.single_transformer_blocks], device, quantization)
    _draw(t5, list(t5.encoder.block), device, quantization_t5 or quantization)
    with on(device, dtype):
        clip = _clip_text(768, 12, 12)
        vae = _vae(16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=CLIPTokenizer.from_pretrained(TINY / "flux/tokenizer", model_max_length=77),
        text_encoder_2=t5,
        tokenizer_2=T5TokenizerFast.from_pretrained(TINY / "flux/tokenizer_2", model_max_length=512),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    for model in (transformer, t5, pipe.text_encoder, pipe.vae):
        model.eval()  # as loading leaves them
    return pipe


def _draw(model: nn.Module, blocks: list[nn.Module], device: str, quantization: Quantization) -> None:
    """Bring a model that is on the meta device to ``device``, one of its blocks after the other, in 4 bits if asked.

    So it is never there in 16 bits as a whole. Weights are small, so that what goes through many blocks stays finite.
    """
    for part in [*blocks, model]:
        drawn: dict[nn.Parameter, nn.Parameter] = {}  # some are used in two places
        for owner in part.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if parameter.is_meta:
                    if parameter not in drawn:
                        weight = torch.empty_like(parameter, device=device).normal_(std=0.02)
                        drawn[parameter] = nn.Parameter(weight, requires_grad=False)
                    setattr(owner, name, drawn[parameter])
        del drawn
        if quantization == "nf4" and part is not model:
            quantise_linears(part, device)


def mvdream(device: str, dtype: torch.dtype = torch.float16) -> MVDream:
    """MVDream: a UNet of 0.87 billion parameters, Stable Diffusion's autoencoder and text encoder."""
    with on(device, dtype):
        unet = UNet2DConditionModel(**unet_config(MVDREAM_UNET))
        vae, text = _vae(4, scaling_factor=0.18215), _clip_text(1024, 23, 16)
    return MVDream(unet, vae, TextEncoder(text, _clip_tokenizer()), _scheduler(), front_azimuth=90.0)


def zero123(device: str, dtype: torch.dtype = torch.float16) -> Zero123:
    """Zero123-XL: Stable Diffusion 1's UNet with 8 input channels, its autoencoder, CLIP ViT-L/14's vision tower."""
    with on(device, dtype):
        unet = UNet2DConditionModel(
            sample_size=32, in_channels=8, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=8, cross_attention_dim=768,
        )  # fmt: skip
        vae, projection = _vae(4, scaling_factor=0.18215), nn.Linear(768 + CAMERA_NUMBERS, 768)
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
            patch_size=14, projection_dim=768,
        )  # fmt: skip
        tower = CLIPVisionModelWithProjection(vision)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return Zero123(unet, vae, tower, projection, CLIPImageProcessor(), scheduler, stable=False)


def mvdream_views(device: str, dtype: torch.dtype = torch.float16, **options: Any) -> MVDreamViews:
    """MVDream, drawing views. `options`: its constructor's."""
    options = {"front_azimuth": 90.0, **options}
    with on(device, dtype):
        unet = UNet2DConditionModel(**unet_config(MVDREAM_UNET))
        vae, text = _vae(4, scaling_factor=0.18215), _clip_text(1024, 23, 16)
    return MVDreamViews(unet, vae, TextEncoder(text, _clip_tokenizer()), _scheduler(), **options)


def imagedream(device: str, dtype: torch.dtype = torch.float16, **options: Any) -> ImageDream:
    """ImageDream: MVDream with 0.08 billion parameters more for the picture, and CLIP ViT-H/14's vision tower, 0.63."""
    options = {"front_azimuth": 90.0, **options}
    with on(device, dtype):
        unet, resampler = image_prompt.build(MVDREAM_UNET | {"ip_dim": 16})
        vae, text = _vae(4, scaling_factor=0.18215), _clip_text(1024, 23, 16)
        vision = CLIPVisionConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
            patch_size=14, hidden_act="gelu",
        )  # fmt: skip
        tower = CLIPVisionModel(vision)
    words = TextEncoder(text, _clip_tokenizer())
    return ImageDream(unet, resampler, vae, words, tower, CLIPImageProcessor(), _scheduler(), **options)


def lgm(device: str, dtype: torch.dtype = torch.float16) -> LGM:
    """LGM big: 0.42 billion parameters."""
    with on(device, dtype):
        return LGM(BIG).eval().requires_grad_(False)


def _clip_tokenizer() -> CLIPTokenizer:
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(TINY / "mvdream/tokenizer", model_max_length=77)
    return tokenizer


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


#: what stands in for a class's ``load(folder, device, dtype, **options)``
STAND_INS: dict[type[Any], Callable[..., Any]] = {
    MVDream: lambda folder, device, dtype, front_azimuth: mvdream(device, dtype),
    Zero123: lambda folder, device, dtype, stable: zero123(device, dtype),
    ImageDream: lambda folder, device, dtype, **options: imagedream(device, dtype, **options),
    LGM: lambda folder, device, dtype: lgm(device, dtype),
    MVDreamViews: lambda folder, device, dtype, **options: mvdream_views(device, dtype, **options),
    Networks: lambda folder, device, dtype: trellis_sizes.networks(device, dtype),
    Condition: lambda folder, device, dtype: trellis_sizes.condition(device, dtype),
}


class RandomParts(Parts):
    """Parts of random weights: generators load as ever, but what reads a folder does not."""

    def __init__(
        self, models: Models, remove_background: RemoveBackground, device: str, progress: Callable[[str], None]
    ) -> None:
        checkpoints = {
            name: Checkpoint(Path("random weights"), lookup(choice), choice, device)
            for name, choice in models.stages.items()
        }
        super().__init__(checkpoints, remove_background, device, progress, models.offload_generators)

    def load(self, name: str, build: Callable[[Checkpoint], Any]) -> Any:
        with ExitStack() as stack:
            for kind, random in STAND_INS.items():
                stack.enter_context(patch.object(kind, "load", random))
            return super().load(name, build)


def matting(device: str, image_size: int, dtype: torch.dtype = torch.float16) -> BackgroundRemover:
    """RMBG-2.0's net, 0.22 billion parameters. Raises SystemExit where MATTING_CODE does not name its code."""
    folder = Path(os.environ.get("MATTING_CODE", ""))
    if not (folder / "config.json").is_file():
        raise SystemExit("set MATTING_CODE to a folder with config.json and the modelling file of RMBG-2.0 or BiRefNet")
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    config: Any = get_class_from_dynamic_module(auto_map["AutoConfig"], folder, local_files_only=True)
    net_class = get_class_from_dynamic_module(auto_map["AutoModelForImageSegmentation"], folder, local_files_only=True)
    torch.manual_seed(0)
    net = net_class(config=config())
    return BackgroundRemover(net.requires_grad_(False).to(device, dtype).eval(), image_size)


def self_check(device: str, offload: bool = False) -> SelfCheck:
    """CLIP convnext_large_d, 0.35 billion parameters; CLIP ViT-L/14-336's vision tower, 0.3; DINOv2-small; AlexNet."""
    torch.manual_seed(0)
    text, image = (REGISTRY[name].clip for name in ("clip-convnext-large-d", "llm2clip-l-14-336"))
    assert text is not None
    assert image is not None
    model = open_clip.create_model("convnext_large_d", device=device)
    tokenizer = open_clip.get_tokenizer("convnext_large_d")
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=1280,
    )  # fmt: skip
    tower = CLIPVisionModelWithProjection(vision).half()
    net = QualityNet(Dinov2Config(**DINOV2_SMALL))
    for each in (model, tower, net):
        each.eval().requires_grad_(False)
    return SelfCheck(
        TextClip(model, tokenizer, text, device, offload),
        ImageClip(tower, image, device, offload),
        Quality(net, device),
        Lpips(_NoTrainLpips(net="alex", pnet_rand=True), device),
        device,
    )


def settings(device: str = "cuda", memory: int | None = None, config: Path | None = None) -> Settings:
    """Those of the full profile, whether or not its weights are here, for a GPU of ``memory`` bytes (None: its own).

    A ``config`` that draws pictures serves them, too.
    """
    models_file, text_config, image_config = PROFILES["full"]
    assert image_config is not None
    if config is not None and load_options(config).draws:
        image_config = config
    config = config or text_config
    models = load_models(models_file)
    memory_class, memory_reason = choose(models.memory_classes, memory or gpu_memory((0,)), None)
    return Settings(
        profile="full", profile_reason="random weights", device=device, config=config, options=load_options(config),
        image_config=image_config, image_options=load_options(image_config), models=models.fitted(memory_class),
        host="127.0.0.1", port=10006,
        memory_class=memory_class.name if memory_class else None, memory_reason=memory_reason,
        validation_threshold=0.0, log_file=ROOT / "logs" / "full_size.log", max_queue=16, gpus=(0,), profile_trace=None,
    )  # fmt: skip


def load(settings: Settings, progress: Callable[[str], None] = lambda text: None, warm: bool = True) -> Pipeline:
    """Every model of the full profile, as the settings say, on their device; warmed up, too."""
    models, device = settings.models, settings.device
    progress("drawing the weights of FLUX.1-schnell")
    drawing = models.text_to_image
    pipe = flux(device, drawing.quantization, quantization_t5=drawing.t5)
    text_to_image = TextToImage(pipe, drawing, device)
    progress("drawing the weights of the others")
    background = matting(device, models.background.image_size)
    text, image = load_generators(settings, RandomParts(models, background.remove, device, progress))
    checking = self_check(device, models.offload_self_check)
    turns = models.offload_generators
    pipeline = Pipeline(text_to_image, background, text, image, checking, device, [], models.max_batch, turns)
    if warm:
        warm_up(pipeline, progress)
    return pipeline


def _vae(latent_channels: int, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=latent_channels, **more,
    )  # fmt: skip


def _clip_text(width: int, layers: int, heads: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
