"""Shows an answer while it is generated: as markdown on a terminal, as plain text elsewhere.

On a terminal the last lines are redrawn in place; lines above them are final and never touched again. rich's
own live display cuts off what is taller than the screen, and miscounts rows when the window is resized.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from lowmem.chat.markdown import Line, plain_text
from lowmem.chat.stream import MarkdownStream, Shown
from lowmem.chat.text import clean

TEXT_WIDTH = 100  # columns: longer lines are hard to read
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_TICK = 0.08  # seconds between two drawings
_UP, _DOWN, _ERASE = "\x1b[{}A", "\x1b[B", "\x1b[K"
# Wrapping is off while the tail is drawn: a character that the terminal draws wider than rich expects would
# wrap its row, and the next drawing would start a row too low.
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"


class View(Protocol):
    """Shows one answer. A context manager, since a thread may draw between the pieces."""

    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def waiting(self, text: str) -> None:
        """Show this status until the first piece."""

    def push(self, text: str) -> None:
        """Show the next piece of the answer."""


class PlainView:
    """Plain text, for NO_COLOR, dumb terminals and files."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._at_start = True
        self._line_open = False

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._line_open:
            self._write("\n")

    def waiting(self, text: str) -> None:
        """Show nothing: it could not be erased."""

    def push(self, text: str) -> None:
        """Write the piece."""
        text = clean(text)
        if self._at_start:
            text = text.lstrip("\n")
        if text:
            self._at_start = False
            self._line_open = not text.endswith("\n")
            self._write(text)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class TerminalView:
    """Markdown, drawn at most every `_TICK` seconds by a thread of its own.

    The thread animates the spinner during prefill, and draws the last pieces of a burst without waiting for
    the next. One lock guards all state. threaded: False draws only in `draw`.
    """

    def __init__(self, console: Console, *, threaded: bool = True) -> None:
        self._console = console
        self._stream = MarkdownStream(console)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True) if threaded else None
        self._drawn: list[str] = []  # the rows of the tail on the screen, as written
        self._cells: list[int] = []  # and their widths
        self._width = 0  # of the terminal at that time
        self._status = ""
        self._frame = 0
        self._text_came = False
        self._changed = False

    def __enter__(self) -> TerminalView:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
        self.draw(done=True)

    def waiting(self, text: str) -> None:
        """Show a spinner with this text until the first piece."""
        with self._lock:
            self._status = text

    def push(self, text: str) -> None:
        """Add a piece, to be drawn soon."""
        with self._lock:
            self._stream.push(text)
            self._text_came = self._text_came or bool(text.strip())
            self._changed = True

    def draw(self, *, done: bool = False) -> None:
        """Draw the text so far. done: all lines are final, and the cursor moves to a new line."""
        with self._lock:
            columns, rows = self._size()
            self._changed = False
            shown = self._stream.show(min(columns, TEXT_WIDTH), max(rows - 1, 1), done=done)
            if not done and not self._text_came and self._status:
                frame = _FRAMES[self._frame % len(_FRAMES)]
                self._frame += 1
                line = f"{frame} {self._status}"[: columns - 1]
                shown = Shown([], [[Segment(line, Style(dim=True))]])
            self._write(shown, columns, rows)

    def _tick(self) -> None:
        pause = _TICK
        while not self._ended.wait(pause):
            if self._changed or (self._status and not self._text_came):
                began = time.perf_counter()
                try:
                    self.draw()
                except (OSError, ValueError):
                    return  # the terminal was closed; the main thread notices too
                # Laying out a long block takes time, which the model needs more.
                pause = max(_TICK, 8 * (time.perf_counter() - began))

    def _size(self) -> tuple[int, int]:
        """Columns and rows, as the window is now."""
        try:
            size = os.get_terminal_size(self._console.file.fileno())
        except (OSError, ValueError, AttributeError):
            size = os.terminal_size((self._console.width, self._console.height))
        return max(size.columns, 1), max(size.lines, 1)

    def _write(self, shown: Shown, columns: int, rows: int) -> None:
        final = [self._ansi(line) for line in shown.final]
        tail = [self._ansi(line) for line in shown.tail]
        keep = 0  # rows of the tail that are unchanged
        if not final and columns == self._width:
            while keep < min(len(tail), len(self._drawn)) and tail[keep] == self._drawn[keep]:
                keep += 1
            if keep == len(tail) == len(self._drawn):
                return
            keep = max(min(keep, len(self._drawn) - 1, len(tail) - 1), 0)
        # A narrower window has wrapped the rows that no longer fit. Rows are erased one by one, because tmux
        # scrolls a copy of the window into its history when all rows are erased at once.
        height = min(sum(max(1, -(-cells // columns)) for cells in self._cells[keep:]), rows)
        up = _UP.format(height - 1) if height > 1 else ""
        output = "\r" + up + _ERASE + (_DOWN + _ERASE) * (height - 1) + up
        output += "".join(line + "\n" for line in final)
        if tail:
            output += _NO_WRAP + "\n".join(tail[keep:]) + _WRAP
        self._drawn, self._cells = tail, [cell_len(plain_text(line)) for line in shown.tail]
        self._width = columns
        self._console.file.write(output)
        self._console.file.flush()

    def _ansi(self, line: Line) -> str:
        """The line with the escape codes of its styles; its text has none."""
        with self._console.capture() as capture:
            self._console.print(Segments(line), end="", soft_wrap=True)
        return capture.get()


def make_view(console: Console) -> View:
    """The view for a console."""
    return PlainView(console) if is_plain(console) else TerminalView(console)


def is_plain(console: Console) -> bool:
    """Whether nothing may be redrawn: no terminal, a dumb one, or NO_COLOR."""
    return not console.is_terminal or console.is_dumb_terminal or console.no_color
