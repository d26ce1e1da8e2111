"""Ends an answer at the end of a line: by the indentation of the next line, or by time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowmem.answer import Response


@dataclass(frozen=True)
class LineLimits:
    """llama.cpp's `n_indent` and `t_max_predict_ms`."""

    indent: int = 0
    """Fewest whitespace characters at the start of a line after the first; an empty line has none."""
    seconds: float = 0.0
    """Time from the first piece, after which the answer ends with its line; 0 is no limit."""

    def __bool__(self) -> bool:
        return self.indent > 0 or self.seconds > 0


NO_LIMITS = LineLimits()


class Lines:
    """Returns streamed text up to the line end at which the limits end it.

    A line end and the indentation behind it are held back until it is clear that the answer goes on.
    """

    def __init__(self, limits: LineLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.over = False
        """Whether the answer has ended."""
        self._limits, self._clock = limits, clock
        self._held = ""
        self._until: float | None = None
        self._written = False  # a line end before the first text does not end the answer

    def push(self, piece: str) -> str:
        """Add a piece; returns the text that is no longer held back, always empty once the answer is over."""
        if self.over:
            return ""
        now = self._clock()
        if self._until is None:
            self._until = now + self._limits.seconds if self._limits.seconds > 0 else float("inf")
        self._held += piece
        ready = ""
        while (line := self._line(now > self._until)) is not None:
            ready += line
        return ready

    def finish(self) -> str:
        """End the input; returns the text that is held back."""
        text, self._held = self._held, ""
        return text

    def _line(self, late: bool) -> str | None:
        """Take the next text whose line end is decided, or None if more must come first."""
        line, end, rest = self._held.partition("\n")
        if not end and not line:
            return None
        self._written = self._written or bool(line.strip())
        if line:
            self._held = end + rest
            return line
        if late and self._written:
            self.over, self._held = True, ""
            return None
        text = rest.lstrip(" \t")
        if self._limits.indent and not text:
            return None
        if len(rest) - len(text) < self._limits.indent:
            self.over, self._held = True, ""
            return None
        self._held = rest
        return end


def limited(response: Response, lines: Lines) -> Response | None:
    """The next piece of an answer, up to the line end at which the limits end it; None if it is held back."""
    text = lines.push(response.text)
    if lines.over:
        return replace(response, text=text, finish_reason="length", stop_text="")
    if response.finish_reason:
        text += lines.finish()
    return replace(response, text=text) if text or response.finish_reason else None
