"""How a measurement reports progress on stderr: a bar in a terminal, lines elsewhere, nothing if quiet."""

from __future__ import annotations

import sys
from typing import Any

from lowmem.commands.answering import note


class Progress:
    """Base class of progress displays; displays nothing."""

    def note(self, line: str) -> None:
        """Print a line above the bar."""

    def begin(self, title: str) -> None:
        """Name the next piece of work."""

    def item(self, line: str) -> None:
        """Print a line on a finished part; a bar shows it in `update` instead."""

    def update(self, done: int, total: int, text: str = "") -> None:
        """Move the bar to `done` of `total`, and replace its title by `text` if that is given."""

    def close(self) -> None:
        """End the bar."""


class Lines(Progress):
    """Prints a line for every note and every piece of work."""

    def note(self, line: str) -> None:
        note(line)

    def begin(self, title: str) -> None:
        note(f"measuring {title}")

    def item(self, line: str) -> None:
        note(line)


class Bar(Progress):
    """Displays one bar, with notes above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns: tuple[Any, ...] = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        # Drawing takes time from what is measured, so it is rare.
        self._bar = RichProgress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def note(self, line: str) -> None:
        self._bar.console.print(line, style="dim", markup=False, highlight=False)

    def begin(self, title: str) -> None:
        self._bar.reset(self._task, description=title, total=None)

    def item(self, line: str) -> None:
        """Print a line on a finished part; a bar shows it in `update` instead."""

    def update(self, done: int, total: int, text: str = "") -> None:
        self._bar.update(self._task, completed=done, total=total, description=text or None)

    def close(self) -> None:
        self._bar.stop()


def make_progress(quiet: bool) -> Progress:
    """Choose the progress display for this process's stderr."""
    if quiet:
        return Progress()
    return Bar() if sys.stderr.isatty() else Lines()
