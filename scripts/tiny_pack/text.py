"""The pack's tokenizers: a small CLIP byte-level BPE and a small T5 Unigram, fitted on its captions.

Both know every byte or letter, so unknown words become pieces rather than errors.
"""

from __future__ import annotations

import json
import math
import random
import string
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from .captions import caption, nonsense, sample_spec

MAX_TOKENS = 32
T5_TOKENS = 20  # FLUX sees the padding as well, so it is sampled with as many as it was trained with
CLIP_VOCABULARY = 1024
T5_WORDS = 600


def corpus(count: int = 30_000, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [caption(sample_spec(rng), rng) for _ in range(count)] + [nonsense(rng) for _ in range(count // 10)]


def clip_tokenizer() -> CLIPTokenizer:
    """BPE with CLIP's word ends; `<|endoftext|>` has the highest id, where CLIP text towers look for it.

    The library counts in hash order: no two fits give the same ids. So CLIP's trainer alone fits one. Others read the
    one that their text tower was trained with, with `clip_tokenizer_of`.
    """
    blank = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = blank.backend_tokenizer.normalizer
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY - 2 - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    model = json.loads(bpe.to_str())["model"]
    pieces = list(model["vocab"])
    pieces += [f"{letter}</w>" for letter in alphabet if f"{letter}</w>" not in model["vocab"]]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def clip_tokenizer_of(folder: Path) -> CLIPTokenizer:
    """The one that was saved with a text tower."""
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram whose pieces are the captions' words and, far less likely, single characters."""
    words = Counter(word for text in corpus() for word in text.split())
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", math.log(n / total)) for word, n in words.most_common(T5_WORDS)]
    pieces += [(letter, -12.0) for letter in [*string.digits, *string.ascii_letters, *string.punctuation, "▁"]]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)
