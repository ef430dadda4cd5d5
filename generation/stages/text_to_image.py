"""Text to image with FLUX.1-schnell (Black Forest Labs, 2024), through ``diffusers.FluxPipeline``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel

from generation.accelerate.compiled import compile_autoencoder
from generation.accelerate.offload import Offloaded
from generation.accelerate.quantise import quantise_linears
from generation.accelerate.text_cache import TextCache, truncation
from generation.schema.options import TextToImageModel
from generation.weights.strict import load_model


class TextToImage:
    """A loaded FLUX pipeline."""

    def __init__(self, pipe: FluxPipeline, options: TextToImageModel, device: str) -> None:
        self._pipe = pipe
        self._options = options
        self._device = device
        self._texts = TextCache(self._encode)
        self._is_compiled = False
        #: T5, if it is on the device only while it encodes prompts that are not cached
        self._offloaded = Offloaded(pipe.text_encoder_2, device) if options.offload_t5 else None
        if self._offloaded:
            self._offloaded.offload()

    @classmethod
    def load(cls, folder: Path, options: TextToImageModel, device: str) -> TextToImage:
        """Load a diffusers FLUX folder (model_index.json and one folder a component) onto ``device``.

        With ``quantization: nf4`` a model comes one layer after the other, so that the device never holds its 16-bit
        weights. Raises WeightsError when a file is not exactly what it should be.
        """
        dtype = getattr(torch, options.dtype)
        t5 = load_model(T5EncoderModel, folder / "text_encoder_2", dtype)
        if options.t5 == "nf4":
            quantise_linears(t5.encoder, device)
        t5.to(device)
        transformer = load_model(FluxTransformer2DModel, folder / "transformer", dtype)
        if options.quantization == "nf4":
            # Layers outside of the blocks are half a percent, and all the rest depends on them: they stay as they are.
            quantise_linears(transformer.transformer_blocks, device)
            quantise_linears(transformer.single_transformer_blocks, device)
        pipe = FluxPipeline.from_pretrained(
            folder, text_encoder_2=t5, transformer=transformer, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe.to(device), options, device)

    @torch.no_grad()
    def warm_up(self, count: int) -> None:
        """On a GPU, draw ``count`` pictures; before the first, prepare the blocks for the compiler.

        Blocks that are alike share compiled code. It is compiled once for one image and once for any larger batch:
        once for each size would reach torch's limit of 8 variants with four images. 4-bit layers are not compiled.
        """
        if self._pipe.device.type != "cuda":
            return
        if not self._is_compiled:
            compile_autoencoder(self._pipe.vae, any_batch=True)
            if self._options.quantization == "none":
                self._pipe.transformer.compile_repeated_blocks(fullgraph=True)
            self._is_compiled = True
        self.generate([f"{number} of {count}" for number in range(count)], list(range(count)))

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: list[int]) -> list[Tensor]:
        """One image (3, image_size, image_size) for each prompt and seed, float32 in 0..1, on the pipeline's device.

        They are sampled together, but each image's noise is drawn by its own generator, on the CPU: an image depends on
        its prompt and seed only, up to rounding.
        """
        options = self._options
        states, pooled = self._embed(prompts)
        images = self._pipe(  # type: ignore[operator]
            prompt_embeds=states,
            pooled_prompt_embeds=pooled,
            width=options.image_size,
            height=options.image_size,
            num_inference_steps=options.steps,
            guidance_scale=0.0,  # schnell is distilled without guidance
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
        return list(images.float().clamp(0, 1))

    def truncation(self, prompt: str) -> dict[str, tuple[int, int]]:
        """For each text encoder that truncates the prompt: (tokens that it reads, tokens of the prompt)."""
        t5 = truncation(self._pipe.tokenizer_2, prompt, self._options.max_sequence_length)
        found = {"text_to_image CLIP": truncation(self._pipe.tokenizer, prompt), "text_to_image T5": t5}
        return {name: tokens for name, tokens in found.items() if tokens}

    def _embed(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of T5 (B, max_sequence_length, width) and of CLIP (B, width), on the device."""
        states, pooled = (torch.stack(each) for each in zip(*self._texts.encode(prompts), strict=True))
        return states, pooled

    def _encode(self, prompts: list[str]) -> list[tuple[Tensor, Tensor]]:
        with self._offloaded.on_device() if self._offloaded else nullcontext():
            states, pooled, _ = self._pipe.encode_prompt(
                prompts, None, self._device, max_sequence_length=self._options.max_sequence_length
            )
        return [(of_t5.clone(), of_clip.clone()) for of_t5, of_clip in zip(states, pooled, strict=True)]
