"""The part of a document that a tool writes, between two marks."""

from __future__ import annotations


def with_section(document: str, begin: str, end: str, section: str) -> str:
    """The document with ``section`` between its marks. Raises ValueError unless each mark is there exactly once."""
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"the document needs {begin.strip()} and {end.strip()}, once each")
    before, rest = document.split(begin)
    return f"{before}{begin}\n\n{section}\n\n{end}{rest.split(end)[1]}"
