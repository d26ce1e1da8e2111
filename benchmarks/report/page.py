"""A report as one HTML page: no scripts, no requests, light and dark, readable on a phone."""

from __future__ import annotations

import re
from pathlib import Path

from lowmem.benchmarks.report.document import Report

TEMPLATES = Path(__file__).parent / "templates"


def unbroken(text: str) -> str:
    """Return `text` with no line break between a number and its unit or error."""
    return re.sub(
        r"(?<=\d) (?=(%|×|±|ms|s|min|h|[KMG]iB|GB/s|[GT]FLOP/s)(\W|$))|(?<=±) (?=\d)", "\u00a0", text
    )


def to_html(report: Report) -> str:
    """Convert the report to an HTML page, with inline plots and escaped texts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Not escaped: the style sheet, and plots, whose texts were escaped when they were drawn.
    environment.filters["drawn"] = Markup
    environment.filters["unbroken"] = unbroken
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html").render(report=report, style=style)
