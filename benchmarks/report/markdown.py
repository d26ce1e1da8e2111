"""A report as GitHub-flavoured Markdown, in which texts from records are never markup."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lowmem.benchmarks.report.document import Report, Section, Table


def escaped(text: str) -> str:
    """Escape `text` so that Markdown displays it literally, in table cells too: no markup, no HTML, no
    links.
    """
    text = re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", text).replace("&", "&amp;")
    text = re.sub(r"://", r"&#58;//", text)
    text = re.sub(r"\b(www)\.", r"\1&#46;", text, flags=re.IGNORECASE).replace("@", "&#64;")
    # Characters that start a heading, a list or a quotation.
    text = re.sub(r"^([-+#=])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def code_block(lines: Sequence[str]) -> str:
    """Format commands as a code block, fenced with more backticks than any of them contains."""
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}sh", *lines, fence])


def markdown_table(table: Table) -> str:
    """Format a table with its caption above and the meanings of its columns below."""
    lines = [
        f"**{escaped(table.caption)}**",
        "",
        "| " + " | ".join(escaped(c.heading) for c in table.columns) + " |",
        "|" + "|".join("--:" if c.number else ":--" for c in table.columns) + "|",
        *("| " + " | ".join(escaped(cell) for cell in row) + " |" for row in table.rows),
    ]
    meanings = [f"{escaped(c.heading)}: {escaped(c.meaning)}" for c in table.columns if c.meaning]
    if meanings:
        lines += ["", *(f"- {meaning}" for meaning in meanings)]
    return "\n".join(lines)


def to_markdown(report: Report) -> str:
    """Convert the report to a Markdown page."""
    return "\n\n".join(_blocks(report)) + "\n"


def _blocks(report: Report) -> Iterator[str]:
    yield f"# {escaped(report.title)}"
    yield escaped(report.subtitle)
    yield "Plots are in [report.html](report.html). Commands that produced this report:"
    yield code_block(report.commands)
    if report.story:
        yield "\n".join(f"- {escaped(sentence)}" for sentence in report.story)
    if report.warnings:
        yield "> Warnings:\n>\n" + "\n".join(f"> - {escaped(w)}" for w in report.warnings)
    for section in report.sections:
        yield from _section(section)
    yield "## Provenance"
    for origin in report.provenance:
        yield f"### {escaped(origin.heading)}"
        rows = (f"| {escaped(name)} | {escaped(value)} |" for name, value in origin.facts)
        yield "\n".join(["| | |", "|:--|:--|", *rows])


def _section(section: Section) -> Iterator[str]:
    yield f"## {escaped(section.heading)}"
    yield from map(escaped, section.text)
    for table in section.tables:
        yield markdown_table(table)
