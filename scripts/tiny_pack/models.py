"""The architectures of the pack: the classes that the full-size weights use, made small."""

from __future__ import annotations

from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from .text import MAX_TOKENS

FLUX_SIZE = 128
MVDREAM_SIZE = 64
CLIP_SIZE = 96
MATTING_SIZE = 128


def flux_vae() -> AutoencoderKL:
    """128 x 128 pixels to 16 x 16 latents of 16 channels, as FLUX's own has."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=FLUX_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        force_upcast=False,
    )


def mvdream_vae() -> AutoencoderKL:
    """64 x 64 pixels to 16 x 16 latents of 4 channels; narrow, for its encoder is in the optimisation loop."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=MVDREAM_SIZE,
        force_upcast=False,
    )


def clip_text(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=width,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def clip_text_of(open_clip_state: dict, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower of an open_clip model (its state dict) as the class that FLUX conditions on."""
    layers = 1 + max(int(key.split(".")[2]) for key in open_clip_state if key.startswith("transformer.resblocks."))
    width = open_clip_state["token_embedding.weight"].shape[1]
    model = clip_text(tokenizer, width, layers)
    names = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {new: open_clip_state[old] for old, new in names.items()}
    for i in range(layers):
        old, new = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            state |= {f"{new}.{b}.{kind}": open_clip_state[f"{old}.{a}.{kind}"] for a, b in parts.items()}
            joint = open_clip_state[f"{old}.attn.in_proj_{kind}"].chunk(3)
            state |= {f"{new}.self_attn.{x}_proj.{kind}": v for x, v in zip("qkv", joint, strict=True)}
    prefix = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    missing, unexpected = model.load_state_dict({prefix + k: v.float() for k, v in state.items()}, strict=False)
    if unexpected or any(not key.endswith("position_ids") for key in missing):
        raise ValueError(f"not an open_clip text tower: {missing} missing, {unexpected} unexpected")
    return model


def t5_text(tokenizer: T5TokenizerFast, width: int = 128, layers: int = 2) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=3 * width,
            num_layers=layers,
            num_heads=width // 32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
        )
    )


def flux_transformer(joint_width: int = 128, pooled_width: int = 128) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=joint_width,
        pooled_projection_dim=pooled_width,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def mvdream_unet(text_width: int = 128) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        attention_head_dim=(2, 3, 5),
        cross_attention_dim=text_width,
        use_linear_projection=True,
        norm_num_groups=16,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=16,
    )


def open_clip_config(vocabulary: int) -> dict:
    """open_clip's `open_clip_config.json`: a timm ConvNeXt and a CLIP text tower, as the validators have."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {
                "timm_model_name": "convnext_zepto_rms",
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": CLIP_SIZE,
            },
            "text_cfg": {
                "context_length": MAX_TOKENS,
                "vocab_size": vocabulary,
                "width": 128,
                "heads": 4,
                "layers": 3,
                "hf_tokenizer_name": "local",
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
