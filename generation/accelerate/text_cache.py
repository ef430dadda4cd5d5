"""A cache of encoded texts.

Negative prompts are always the same. Prompts come back with other seeds after a rejection, and from several validators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

V = TypeVar("V")

KEPT = 32  # texts; of 2 MB each, on a GPU, for T5 at full size


class TextCache(Generic[V]):
    """Least-recently-used cache of what ``encode`` returns for texts, one value for each of a list.

    Each value must have its own memory. A view would keep the memory of the whole batch.
    """

    def __init__(self, encode: Callable[[list[str]], Iterable[V]]) -> None:
        self._encode = encode
        self._known: dict[str, V] = {}

    def encode(self, texts: Sequence[str]) -> list[V]:
        """The value of each text, in order. Those that are not cached are encoded in one batch."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= zip(new, self._encode(new), strict=True)
        for text in texts:
            self._known[text] = self._known.pop(text)  # most recently used last
        found = [self._known[text] for text in texts]
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return found


def truncation(tokenizer: Any, text: str, most: int | None = None) -> tuple[int, int] | None:
    """(tokens that are read, tokens of ``text``) when the encoder truncates it; None when it reads all of it.

    ``tokenizer`` is one of transformers or open_clip. ``most`` is the limit in tokens, by default the tokenizer's own.
    """
    most = most or getattr(tokenizer, "context_length", None) or tokenizer.model_max_length
    if hasattr(tokenizer, "clean_fn"):  # open_clip's
        text = tokenizer.clean_fn(text)
        inner = getattr(tokenizer, "tokenizer", None)
        count = len(tokenizer.encode(text)) + 2 if inner is None else len(inner(text).input_ids)  # 2: start and end
    else:
        count = len(tokenizer(text).input_ids)
    return (most, count) if count > most else None
