"""What values settings take."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

TEXT = "text"


class Check(Protocol):
    """What values a setting takes. Both methods raise ValueError with the limit in words."""

    limits: str

    def from_text(self, text: str) -> Any:
        """A value of the command line or the environment."""

    def from_toml(self, value: Any) -> Any:
        """The same from the file, where it has a type."""


class Whole:
    """A whole number from `low` to `high`."""

    def __init__(self, low: int, high: int, why: str = "") -> None:
        self._low, self._high = low, high
        self.limits = f"a whole number in {low}..{high}{why and f' ({why})'}"

    def from_text(self, text: str) -> int:
        return self.from_toml(int(text) if re.fullmatch(r"-?[0-9]{1,18}", text.strip()) else None)

    def from_toml(self, value: Any) -> int:
        if type(value) is not int or not self._low <= value <= self._high:
            raise ValueError(f"must be {self.limits}")
        return value


class Number:
    """A number from `low` to `high`."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        self.limits = f"a number in {low:g}..{high:g}"

    def from_text(self, text: str) -> float:
        try:
            return self.from_toml(float(text))
        except ValueError:
            raise ValueError(f"must be {self.limits}") from None

    def from_toml(self, value: Any) -> float:
        # Not a number (NaN) is within nothing.
        if type(value) not in (int, float) or not self._low <= value <= self._high:
            raise ValueError(f"must be {self.limits}")
        return float(value)


class Words:
    """Text. `check` raises ValueError for what is wrong with it; `limits` says what is right."""

    def __init__(self, check: Callable[[str], object] = lambda _: None, limits: str = TEXT) -> None:
        self._check = check
        self.limits = limits

    def from_text(self, text: str) -> str:
        self._check(text)
        return text

    def from_toml(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"must be {self.limits}, in quotes")
        return self.from_text(value)


class Choice(Words):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        super().__init__(self._one_of, f"{', '.join(words[:-1])} or {words[-1]}")
        self.words = words

    def _one_of(self, text: str) -> None:
        if text not in self.words:
            raise ValueError(f"must be {self.limits}")


class Switch:
    """On or off. Its flag takes no value and says on."""

    limits = "true or false"

    def from_text(self, text: str) -> bool:
        return self.from_toml({"true": True, "false": False}.get(text.strip().lower()))

    def from_toml(self, value: Any) -> bool:
        if type(value) is not bool:
            raise ValueError(f"must be {self.limits}")
        return value


class FilePath:
    """A file or folder. Relative ones begin at the file's folder in the file, else where the process was started."""

    limits = "a path"

    def __init__(self, exists: bool = False) -> None:
        """`exists`: whether it has to be there when its process starts."""
        self.exists = exists

    def from_text(self, text: str) -> Path:
        return self.from_toml(text)

    def from_toml(self, value: Any) -> Path:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError("must be a path, in quotes")
        return Path(value)


class Many:
    """A list of values of one kind, each of them once. In a variable they stand between commas or spaces."""

    def __init__(self, each: Callable[[Any], Any], limits: str, least: int = 0) -> None:
        """`each` takes one value, as text or as TOML has it, and raises ValueError."""
        self._each = each
        self.least = least
        self.limits = limits

    def from_text(self, text: str) -> tuple[Any, ...]:
        return self.from_toml(re.split(r"[\s,]+", text.strip(", \t\n")) if text.strip(", \t\n") else [])

    def from_toml(self, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"must be a list of {self.limits}")
        if len(value) < self.least:
            raise ValueError(f"must be at least {self.least} of {self.limits}")
        return tuple(dict.fromkeys(self._each(item) for item in value))
