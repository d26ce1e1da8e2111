"""What a model or a file says is data: nothing of it may steer the terminal."""

from __future__ import annotations

_KEPT = "\n\t"
# C0, DEL and C1 controls; then marks that reorder the text around them, so that code reads other than it is.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_DELETED = {code: None for code in _CONTROLS if chr(code) not in _KEPT}
# Half a surrogate pair has no encoding: printing or saving it would fail.
_REPLACED = dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
_TABLE: dict[int, str | None] = {**_DELETED, **_REPLACED}


def clean(text: str) -> str:
    """The text without control characters (line feed and tab stay), one character at a time.

    An escape sequence loses its escape character and stays as harmless text; since no character depends on
    another, a text cleaned in pieces is the same as one cleaned whole.
    """
    return text.translate(_TABLE)


def one_line(text: str, limit: int = 60) -> str:
    """A text's first words on one line, for messages about it."""
    line = " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
