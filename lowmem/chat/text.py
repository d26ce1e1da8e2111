"""What a model or a file says is data: nothing of it may steer the terminal."""

from __future__ import annotations

from lowmem.text.markup import clean

__all__ = ["clean", "one_line"]


def one_line(text: str, limit: int = 60) -> str:
    """A text's first words on one line, for messages about it."""
    line = " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
