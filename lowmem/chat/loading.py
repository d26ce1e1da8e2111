"""What a terminal shows while a model is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def loading(model: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A spinner on a terminal's stderr, with the bytes read so far; the function that hears of them."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.console import Console
    from rich.text import Text

    from lowmem.chat.text import one_line
    from lowmem.text.units import format_bytes

    name = one_line(model)
    with Console(stderr=True).status(Text(f"loading {name}", "dim")) as status:

        def progress(done: int, total: int) -> None:
            amount = f"{format_bytes(done)} of {format_bytes(total)}"
            status.update(Text(f"loading {name}: {amount}", "dim"))

        yield progress
