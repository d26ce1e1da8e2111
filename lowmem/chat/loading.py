"""The progress of loading a model, as a terminal shows it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lowmem.chat.text import one_line
from lowmem.text.units import format_bytes


class Loading:
    """`text` says how many bytes of a model are read."""

    def __init__(self, model: str, *, quiet: bool = False) -> None:
        self.text = self._name = f"loading {one_line(model)}"
        self._quiet = quiet

    def update(self, done: int, total: int) -> None:
        """Bytes read, and in total."""
        self.text = f"{self._name}: {format_bytes(done)} of {format_bytes(total)}"

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show a spinner with the text where standard error is a terminal."""
        if self._quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            yield
            return
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        spinner = Spinner("dots")

        def frame() -> Spinner:
            spinner.update(text=Text(self.text, "dim"))
            return spinner

        with Live(
            console=Console(stderr=True), get_renderable=frame, transient=True, refresh_per_second=12.5
        ):
            yield
