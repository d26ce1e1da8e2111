"""A report as one HTML page: no script, no request, light and dark, for a phone and a desk."""

from __future__ import annotations

import re
from pathlib import Path

from lowmem.benchmarks.report.report import Report

TEMPLATES = Path(__file__).parent / "templates"


def unbroken(text: str) -> str:
    """A number kept on one line with its unit and its error."""
    return re.sub(
        r"(?<=\d) (?=(%|×|±|ms|s|min|h|[KMG]iB|GB/s|[GT]FLOP/s)(\W|$))|(?<=±) (?=\d)", "\u00a0", text
    )


def to_html(report: Report) -> str:
    """The whole page; its plots are inline, its texts escaped."""
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
    # Only what we drew or wrote is not escaped: plots (escaped when they were drawn) and the style sheet.
    environment.filters["drawn"] = Markup
    environment.filters["unbroken"] = unbroken
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html").render(report=report, style=style)
