"""The CLIP text encoder of a diffusion model, cached."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from generation.accelerate.offload import Offloaded
from generation.accelerate.pinned import copy_async
from generation.accelerate.text_cache import TextCache, truncation
from generation.weights.strict import load_model


class TextEncoder(TextCache[Tensor]):
    """Texts to text states (L, C)."""

    #: set where the encoder is on its device only while it encodes
    offloaded: Offloaded | None = None

    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__(self._states)
        self.encoder = encoder.eval().requires_grad_(False)
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, device: str | torch.device, dtype: torch.dtype) -> TextEncoder:
        """From a folder's `text_encoder` and `tokenizer`. Raises WeightsError."""
        encoder = load_model(CLIPTextModel, folder / "text_encoder", dtype)
        return cls(encoder.to(device), CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))

    def truncation(self, text: str) -> tuple[int, int] | None:
        """(tokens that are read, tokens of the text) if the text is truncated, else None."""
        return truncation(self._tokenizer, text)

    def pair(self, text: str, negative: str) -> Tensor:
        """Text states (2, L, C) of the negative text, then of the text."""
        return torch.stack(self.encode([negative, text]))

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Tensor]:
        ids = self._tokenizer(
            texts,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with self.offloaded.on_device() if self.offloaded else nullcontext():
            states = self.encoder(copy_async(ids, self.encoder.device)).last_hidden_state
        return [each.clone() for each in states]
