"""vLLM's log in few words: what it does now, and why it failed."""

from __future__ import annotations

import re
from pathlib import Path

from lowmem.errors import printable

_TAIL = 256 << 10
"""Bytes at the end of a log that are read."""
_LONGEST = 400
_PREFIX = re.compile(
    r"^(?:\([^()]{1,60} pid=\d+\) )?(?:(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]{1,80}\] ?)?"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Exit|Interrupt|Unsupported|NotFound)\b(?::|$)"
)
_USAGE = re.compile(r"^[\w. -]{1,60}: error: (.+)")
_FOLLOWS = ("Engine core initialization failed", "Engine process failed", "cancelled", "EngineDeadError")
"""Errors that only say that there was another one."""


def lines_of(log: Path) -> list[tuple[str, str]]:
    """The last lines of a log: (level or "", text without vLLM's prefixes). Empty if it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            text = file.read(_TAIL).decode("utf-8", "replace")
    except OSError:
        return []
    found = []
    for line in re.split(r"[\r\n]+", _COLOUR.sub("", text)):
        match = _PREFIX.match(line)
        assert match is not None  # both of its parts are optional
        found.append((match["level"] or "", line[match.end() :].rstrip()))
    return found


def doing(log: Path) -> str:
    """What vLLM says that it does now, in a few words; "" if it says nothing."""
    for level, text in reversed(lines_of(log)):
        words = text.strip()
        if level == "INFO" and words.isascii() and re.match(r"[A-Z]", words):
            return printable(words.partition(" with config:")[0])[:70].rstrip(" .:")
    return ""


def cause(log: Path) -> str:
    """The line of a log that tells why vLLM ended; "" if none does.

    The first error counts whose text is its own: those of other processes follow from it.
    """
    texts = [text for _level, text in lines_of(log)]
    last = ""
    for at, text in enumerate(texts):
        if match := _USAGE.match(text):
            return _short(match[1])
        if not _ERROR.match(text):
            continue
        told = _of_pydantic(text, texts[at + 1 : at + 8]) or text
        if not any(sign in told for sign in _FOLLOWS):
            return _short(told)
        last = told
    return _short(last)


def _of_pydantic(text: str, following: list[str]) -> str:
    """The reason in a ValidationError, which is on one of the next lines, before the input that it quotes."""
    if "ValidationError" not in text:
        return ""
    found = next((line.strip() for line in following if "[type=" in line), "")
    return found.partition(" [type=")[0].removeprefix("Value error, ")


def _short(text: str) -> str:
    text = printable(" ".join(text.split())).rstrip(".")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
