"""How an answer is drawn while it comes: as markdown on a terminal, as it is anywhere else.

A terminal's tail is drawn over itself; final lines go above it and are never touched again. rich's own live
display cuts what is taller than the screen, and reckons wrongly when the window changes its width.
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
# While the tail is drawn nothing wraps: a character that the terminal holds for wider than rich does would
# make a row two, and the next drawing would start a row too low.
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"


class View(Protocol):
    """What shows one answer; a context manager, since drawing goes on between the pieces."""

    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def waiting(self, text: str) -> None:
        """Say what is being done until the first piece comes."""

    def push(self, text: str) -> None:
        """Show the next piece of the answer."""


class PlainView:
    """The answer as it is, for NO_COLOR and terminals that can do nothing."""

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
        """Nothing: it could not be taken back."""

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
    """The answer as markdown, drawn at most every `_TICK` seconds by a thread of its own.

    The thread turns the spinner while the model reads, and shows the last pieces of a burst without waiting
    for the next. All state is under one lock. `threaded` False: only `draw` draws.
    """

    def __init__(self, console: Console, *, threaded: bool = True) -> None:
        self._console = console
        self._stream = MarkdownStream(console)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True) if threaded else None
        self._drawn: list[str] = []  # the rows of the tail on the screen, as they were written
        self._cells: list[int] = []  # and how wide each is
        self._width = 0  # of the terminal when they were
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
        """Show a spinner with this text until the answer begins."""
        with self._lock:
            self._status = text

    def push(self, text: str) -> None:
        """Add a piece; it is drawn soon."""
        with self._lock:
            self._stream.push(text)
            self._text_came = self._text_came or bool(text.strip())
            self._changed = True

    def draw(self, *, done: bool = False) -> None:
        """Bring the screen up to the text. done: all of it is final, and the cursor goes to a new line."""
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
                    return  # the terminal has gone; the main thread will see that, too
                # A very long block takes time to lay out: the model's own work comes first.
                pause = max(_TICK, 8 * (time.perf_counter() - began))

    def _size(self) -> tuple[int, int]:
        """Columns and rows now: the window may have changed since the last drawing."""
        try:
            size = os.get_terminal_size(self._console.file.fileno())
        except (OSError, ValueError, AttributeError):
            size = os.terminal_size((self._console.width, self._console.height))
        return max(size.columns, 1), max(size.lines, 1)

    def _write(self, shown: Shown, columns: int, rows: int) -> None:
        final = [self._ansi(line) for line in shown.final]
        tail = [self._ansi(line) for line in shown.tail]
        keep = 0  # rows of the tail that are right as they stand
        if not final and columns == self._width:
            while keep < min(len(tail), len(self._drawn)) and tail[keep] == self._drawn[keep]:
                keep += 1
            if keep == len(tail) == len(self._drawn):
                return
            keep = max(min(keep, len(self._drawn) - 1, len(tail) - 1), 0)
        # A window made narrower has wrapped the rows that no longer fit. Rows are erased one by one: told to
        # erase all below the top, tmux keeps a copy of the whole window.
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
        """The line with the escape codes of its styles, which are ours, around text that has none."""
        with self._console.capture() as capture:
            self._console.print(Segments(line), end="", soft_wrap=True)
        return capture.get()


def make_view(console: Console) -> View:
    """The view that suits the console."""
    return PlainView(console) if is_plain(console) else TerminalView(console)


def is_plain(console: Console) -> bool:
    """Whether nothing may be drawn over: no terminal, a dumb one, or colours that nobody wants."""
    return not console.is_terminal or console.is_dumb_terminal or console.no_color
