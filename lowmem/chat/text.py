"""Text of a model or a file, made safe for a terminal."""

from __future__ import annotations

from lowmem.text.markup import clean

__all__ = ["clean", "one_line"]


def one_line(text: str, limit: int = 60) -> str:
    """The beginning of a text on one line, without control characters."""
    line = " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
