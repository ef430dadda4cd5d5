"""Random checkpoints in the true layouts, a few hundred kilobytes each: what loads them loads the real ones.

``build(folder)`` writes flux/, background/, mvdream/, zero123/ and clip/ with a card each, and models.yaml, which
names them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

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
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from generation.generators.lgm.network import LGM, Config
from scripts.tools import small_imagedream
from scripts.tools.golden_weights import golden
from tests.support import mini_matting

MAX_TOKENS = 16
WIDTH = 32
COSINE_SCALE = 0.5

MODELS_YAML = """
text_to_image: {model: ./flux, image_size: 64, steps: 2, max_sequence_length: 16}
background: {model: ./background, image_size: 64}
mvdream: {model: ./mvdream}
zero123: {model: ./zero123}
stable_zero123: {model: ./zero123}
lgm: {model: ./lgm}
clip: {model: ./clip}
"""


def build(folder: Path) -> Path:
    """Write all checkpoints into ``folder``. Returns the models file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux(folder / "flux")
        background(folder / "background")
        mvdream(folder / "mvdream")
        zero123(folder / "zero123")
        lgm(folder / "lgm")
        clip(folder / "clip")
    models = folder / "models.yaml"
    models.write_text(MODELS_YAML)
    return models


def flux(folder: Path) -> None:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(latent_channels=16, blocks=4),
        text_encoder=clip_text(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2), d_model=WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
                feed_forward_proj="gated-gelu", is_encoder_decoder=False,
            )
        ),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder)  # fmt: skip
    card(folder)


def background(folder: Path) -> None:
    """The net's file lies beside its weights and is named by ``auto_map``, as in RMBG-2.0's repository."""
    net = mini_matting.MiniMatting(mini_matting.MiniMattingConfig())
    folder.mkdir(parents=True)
    shutil.copy(mini_matting.__file__, folder / "mini_matting.py")
    auto_map = {
        "AutoConfig": "mini_matting.MiniMattingConfig",
        "AutoModelForImageSegmentation": "mini_matting.MiniMatting",
    }
    (folder / "config.json").write_text(json.dumps({**net.config.to_dict(), "auto_map": auto_map}))
    save_file(net.state_dict(), folder / "model.safetensors")
    card(folder)


def mvdream(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64), attention_head_dim=(1, 2), cross_attention_dim=WIDTH, norm_num_groups=8,
        use_linear_projection=True, class_embed_type="projection", projection_class_embeddings_input_dim=16,
    ).save_pretrained(folder / "unet")  # fmt: skip
    vae(latent_channels=4).save_pretrained(folder / "vae")
    clip_text(tokenizer).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    ).save_pretrained(folder / "scheduler")
    card(folder)


def imagedream(folder: Path) -> None:
    """With its authors' names in the UNet, as it is published."""
    about = golden("imagedream_views")[1]
    small_imagedream.write(folder, about["config"]["context_dim"])
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "MultiViewUNetModel", **about["config"]}))
    state = small_imagedream.unet_weights(about["shapes"])
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    card(folder)


def zero123(folder: Path) -> None:
    """One folder a component, as DreamGaussian's pipeline saves it."""
    UNet2DConditionModel(
        sample_size=32, in_channels=8, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, cross_attention_dim=WIDTH, norm_num_groups=8,
    ).save_pretrained(folder / "unet")  # fmt: skip
    vae(latent_channels=4, blocks=4).save_pretrained(folder / "vae")
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=224,
            patch_size=56, projection_dim=WIDTH,
        )
    ).save_pretrained(folder / "image_encoder")  # fmt: skip
    layer = torch.nn.Linear(WIDTH + 4, WIDTH)
    (folder / "clip_camera_projection").mkdir()
    save_file(
        {f"proj.{name}": tensor for name, tensor in layer.state_dict().items()},
        folder / "clip_camera_projection" / "diffusion_pytorch_model.safetensors",
    )
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    card(folder)


def lgm(folder: Path) -> None:
    """Of eight views of 64 pixels, as the pack's own; its Gaussians are anywhere."""
    config = Config(
        down_channels=(8, 8), down_attention=(False, False), up_channels=(8, 8), up_attention=(False, False),
        attention_heads=2, norm_groups=4, input_size=64, background=(1.0, 0.0, 1.0), position="ray",
        views=tuple((elevation, 90.0 * i + start) for elevation, start in ((20.0, 0.0), (5.0, 45.0)) for i in range(4)),
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    save_file(LGM(config).state_dict(), folder / "model.safetensors")
    card(folder)


def clip(folder: Path) -> None:
    """A CLIP that means nothing: its embeddings are random."""
    tokenizer = clip_tokenizer()
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    config = {
        "model_cfg": {
            "embed_dim": WIDTH,
            "vision_cfg": {
                "timm_model_name": "convnext_atto", "timm_model_pretrained": False, "timm_pool": "",
                "timm_proj": "linear", "image_size": 64,
            },
            "text_cfg": {
                "context_length": MAX_TOKENS, "vocab_size": len(tokenizer), "width": WIDTH, "heads": 2, "layers": 1,
                "hf_tokenizer_name": "local",
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    card(folder, cosine_scale=COSINE_SCALE)


def card(folder: Path, **more: float) -> None:
    text = {"name": f"mini-{folder.name}", "licence": "MIT", **more}
    (folder / "card.json").write_text(json.dumps(text))


def clip_tokenizer() -> CLIPTokenizer:
    """Letters only, without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)


def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(letter), -4.0) for letter in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def clip_text(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def vae(latent_channels: int, blocks: int = 3) -> AutoencoderKL:
    """A quarter of the resolution with three blocks, an eighth with four, as FLUX and Zero123 want it."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks, layers_per_block=1, latent_channels=latent_channels, norm_num_groups=4,
        sample_size=64, use_quant_conv=latent_channels == 4, use_post_quant_conv=latent_channels == 4,
        shift_factor=0.0 if latent_channels == 16 else None,
    )  # fmt: skip
