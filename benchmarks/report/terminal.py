"""A report's tables in a terminal: what `lowmem bench` prints after a measurement."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lowmem.benchmarks.report.document import Table

PIPE_WIDTH = 160
"""Columns of output that goes to a file or a pipe."""


def print_tables(tables: Sequence[Table], notes: Sequence[str] = ()) -> None:
    """Print tables and then lines on stdout; nothing in them steers the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    for table in tables:
        drawn = RichTable(title=Text(table.caption), title_justify="left", box=box.SIMPLE_HEAD)
        for column in table.columns:
            drawn.add_column(column.heading, justify="right" if column.number else "left")
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(drawn)
    for line in notes:
        console.print(line, markup=False, highlight=False)
