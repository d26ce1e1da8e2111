"""Reports for tests, and parsers for their pages."""

from __future__ import annotations

import dataclasses
import functools
from html.parser import HTMLParser
from xml.etree import ElementTree

from lowmem.benchmarks.report.build import make_report
from lowmem.benchmarks.report.document import Report
from lowmem.benchmarks.report.inputs import Records

from tests.benchmarks.bench_records import (
    FORMS,
    HOSTILE,
    a_subject_latency,
    a_text,
    does_not_fit,
    humaneval_record,
    latency_record,
    many_forms,
    quality_record,
)

COMMAND = "lowmem bench report"


class Cells(HTMLParser):
    """All tables of a page by caption, as rows of texts, and all tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._rows: list[list[str]] = []
        self._open: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th", "caption"):
            self._open = []

    def handle_endtag(self, tag):
        if tag == "caption":
            self._rows = self.tables.setdefault("".join(self._open), [])
        if tag in ("td", "th"):
            self._rows[-1].append("".join(self._open))
        if tag in ("td", "th", "caption"):
            self._open = None

    def handle_data(self, data):
        self.text.append(data)
        if self._open is not None:
            self._open.append(data)


@functools.lru_cache(maxsize=8)
def tables_of(page: str) -> dict[str, list[list[str]]]:
    return Cells(page).tables


def rows_of(page: str, caption: str) -> dict[str, dict[str, str]]:
    """Rows of a table of the page, keyed by version, each as {heading: cell}."""
    heading, *rows = tables_of(page)[caption]
    named = [dict(zip(heading, row, strict=True)) for row in rows]
    return {row["Version"]: row for row in named}


def text_of(markup: str) -> str:
    reader = Cells(markup)
    return "".join(reader.text)


def hostile_records() -> Records:
    form = dataclasses.replace(FORMS[3], label=HOSTILE, method="gptq", dtype=HOSTILE, path=HOSTILE)
    latency = latency_record(
        [dataclasses.replace(does_not_fit(form), reason=HOSTILE), a_subject_latency(FORMS[4])],
        warnings=[HOSTILE],
        source=HOSTILE,
    )
    latency = dataclasses.replace(
        latency, origin=dataclasses.replace(latency.origin, command="lowmem\n````\n" + HOSTILE)
    )
    humaneval = humaneval_record((form,))
    attempts = tuple(
        dataclasses.replace(a, outcome=HOSTILE, detail=HOSTILE, completion=HOSTILE, task=HOSTILE)
        for a in humaneval.subjects[0].attempts
    )
    humaneval = dataclasses.replace(
        humaneval, subjects=(dataclasses.replace(humaneval.subjects[0], attempts=attempts),)
    )
    return Records(
        quality_record((form, FORMS[0]), (HOSTILE, "</style><img src=x onerror=alert(1)>")),
        latency,
        humaneval,
    )


@functools.cache
def hostile_report() -> Report:
    """The report on `hostile_records`, drawn once per process."""
    return make_report(hostile_records(), HOSTILE)


def extreme_records() -> Records:
    """30 versions with long names: one equals the reference, another is very far from it."""
    forms = many_forms(30, "a very long name indeed, " * 8 + "{}")
    quality = quality_record(forms, texts=("one",))
    zero = dataclasses.replace(quality.subjects[2], texts=(a_text("one", 0.0),))
    huge = dataclasses.replace(quality.subjects[3], texts=(a_text("one", 30.0),))
    quality = dataclasses.replace(
        quality, subjects=(*quality.subjects[:2], zero, huge, *quality.subjects[4:])
    )
    return Records(quality, latency_record([a_subject_latency(form, (64,)) for form in forms[:10]]))


@functools.cache
def extreme_report() -> Report:
    """The report on `extreme_records`, drawn once per process."""
    return make_report(extreme_records(), COMMAND)


def drawings(report: Report) -> list[ElementTree.Element]:
    plots = [s.plot for s in report.sections if s.plot]
    return [ElementTree.fromstring(svg) for plot in plots for svg in (plot.narrow, plot.wide)]
