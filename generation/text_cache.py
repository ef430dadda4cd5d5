"""Texts encoded once: negative prompts are always the same, and prompts are tried with other seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

KEPT = 64


class TextCache:
    """What `encode` makes of texts, (T, ...) of a list of T; of the latest 64."""

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode
        self._known: dict[str, Tensor] = {}

    def read(self, texts: Sequence[str]) -> list[Tensor]:
        """(...) of each; those that are new are encoded together, in the time of one."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= zip(new, (each.clone() for each in self._encode(new)), strict=True)
        for text in texts:
            self._known[text] = self._known.pop(text)  # the last one used stands at the end
        found = [self._known[text] for text in texts]
        while len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return found
