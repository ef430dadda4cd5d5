"""Texts encoded once: negative prompts are always the same, and prompts come back, with other seeds after a rejection,
and from more than one validator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

V = TypeVar("V")

KEPT = 32  # of 2 MB each, on a GPU, for T5 at full size


class TextCache(Generic[V]):
    """What `encode` makes of texts, one for each of a list; of the latest 32.

    Each must have its own memory: a view would keep that of all that were encoded with it.
    """

    def __init__(self, encode: Callable[[list[str]], Iterable[V]]) -> None:
        self._encode = encode
        self._known: dict[str, V] = {}

    def encode(self, texts: Sequence[str]) -> list[V]:
        """Of each; those that are new are encoded together, in the time of one."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= zip(new, self._encode(new), strict=True)
        for text in texts:
            self._known[text] = self._known.pop(text)  # the last one used stands at the end
        found = [self._known[text] for text in texts]
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return found


def cut(tokenizer: Any, text: str, most: int | None = None) -> tuple[int, int] | None:
    """Tokens that are read and tokens of `text` when these are more; None when all are read.

    `tokenizer` is one of transformers or open_clip; `most` is what it is asked for, by default its own limit.
    """
    most = most or getattr(tokenizer, "context_length", None) or tokenizer.model_max_length
    if hasattr(tokenizer, "clean_fn"):  # open_clip's
        text = tokenizer.clean_fn(text)
        inner = getattr(tokenizer, "tokenizer", None)
        count = len(tokenizer.encode(text)) + 2 if inner is None else len(inner(text).input_ids)  # 2: start and end
    else:
        count = len(tokenizer(text).input_ids)
    return (most, count) if count > most else None
