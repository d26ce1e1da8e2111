"""Rows become documents: what was taken is counted by its field, bad rows are skipped while they are few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.convert.reading.layouts import KNOWN, Document, document_of_row
from lowmem.convert.reading.oasst import is_message_row, is_tree, messages_of_tree, oasst_dialogues
from lowmem.convert.reading.tables import Row

from lowmem.errors import CalibrationError


@dataclass(frozen=True)
class Collected:
    """The documents of a source's rows, and what became of the others."""

    documents: tuple[Document, ...]
    taken: str
    """How many of which kind from which fields, in words."""
    rows: int
    """All rows, but empty lines."""
    skipped: int
    """Rows that could not be read."""
    first_problem: str = ""
    """Place and reason of the first of them."""
    empty: int = 0
    """Rows without text."""

    def notes(self, name: str) -> list[str]:
        """Remarks for the user: what was taken, what was left out."""
        found = [f"{name}: {self.taken}"]
        if self.empty:
            found.append(f"{name}: {_counted(self.empty, 'row')} of {self.rows:,} without text left out")
        if self.skipped:
            found.append(f"{name}: {self.skipped_words}; the first is {self.first_problem}")
        return found

    @property
    def skipped_words(self) -> str:
        """ "3 of 4,000 rows skipped"; empty if none is."""
        return f"{self.skipped:,} of {_counted(self.rows, 'row')} skipped" if self.skipped else ""


def tolerated(rows: int) -> int:
    """How many bad rows are skipped: 1 %, and in a short file three, but never more than a tenth."""
    return max(rows // 100, min(3, rows // 10))


def collect(rows: Iterable[Row], name: str) -> Collected:
    """The documents of rows. Raises CalibrationError, which names the first, if too many are bad."""
    documents: list[Document] = []
    messages: list[Mapping[str, Any]] = []  # of OpenAssistant's trees, which are put together at the end
    taken: Counter[tuple[str, str]] = Counter()
    count = empty = skipped = 0
    first = ""
    for row in rows:
        count += 1
        try:
            if row.problem:
                raise ValueError(row.problem)
            if is_message_row(row.value):
                messages.append(row.value)
                continue
            if is_tree(row.value):
                messages += messages_of_tree(row.value)
                continue
            if row.value is None:
                empty += 1
                continue
            document, field = document_of_row(row.value)
        except (ValueError, RecursionError) as error:
            skipped += 1
            first = first or f"{row.place}: {error}"
            continue
        if document is None:
            empty += 1
        else:
            documents.append(document)
            taken[("text" if isinstance(document, str) else "dialogue", field)] += 1
    if skipped > tolerated(count):
        rest = f" ({skipped:,} of {count:,} rows cannot be read)" if skipped > 1 else ""
        raise CalibrationError(f"{name}, {first}{rest}", KNOWN)
    if messages:
        trees = oasst_dialogues(messages, None)
        documents += trees
        taken[("dialogue", "message trees")] = len(trees)
    words = " and ".join(f"{_counted(n, kind)} from {field}" for (kind, field), n in taken.items())
    return Collected(tuple(documents), words or "no text", count, skipped, first, empty)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
