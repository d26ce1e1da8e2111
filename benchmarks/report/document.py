"""A report as a value: what the Markdown page and the HTML page both show. All texts are finished."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.benchmarks.report.svg import Plot


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    heading: str
    meaning: str = ""
    """A sentence that explains the heading; "" where it needs none."""
    number: bool = True
    """Whether its cells are numbers, aligned to the right."""


@dataclass(frozen=True)
class Table:
    """A table of finished texts."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """Whether the HTML page shows it only after a click."""

    @property
    def name_column(self) -> int:
        """Index of the column that names a row: the first one of words."""
        return next((i for i, column in enumerate(self.columns) if not column.number), 0)


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, a plot and tables."""

    key: str
    """Its id in the HTML page."""
    heading: str
    text: tuple[str, ...]
    tables: tuple[Table, ...]
    plot: Plot | None = None


@dataclass(frozen=True)
class Tile:
    """A headline figure such as `26 %`."""

    figure: str
    name: str
    remark: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where one record comes from."""

    heading: str
    facts: tuple[tuple[str, str], ...]
    """(name, value)."""


@dataclass(frozen=True)
class Report:
    """The whole report."""

    title: str
    subtitle: str
    tiles_of: str
    """The version that the tiles describe; "" without tiles."""
    tiles: tuple[Tile, ...]
    story: tuple[str, ...]
    """The main results, a sentence each."""
    warnings: tuple[str, ...]
    commands: tuple[str, ...]
    """Commands that produce the records and these pages again."""
    sections: tuple[Section, ...]
    provenance: tuple[Provenance, ...]
