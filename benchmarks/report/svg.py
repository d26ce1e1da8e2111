"""SVG elements for the report's page: drawn and laid out by matplotlib, coloured by the page.

A plot is drawn twice, for a phone and for a desktop, one point to a CSS pixel, so text keeps its size.
Colours are CSS variables (light and dark follow the page), text stays text in the page's font, ids are unique
within the page, and the same input gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lowmem.errors import InvalidRequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTER, FINE = 13, 12
"""Font sizes in pixels: of names and values, and of ticks."""
NARROW, WIDE = 328, 900
"""Widths in pixels: for a phone of 360 pixels less its margins, and for everything wider."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
COLORS = 8
# matplotlib needs colour values. Each of these is replaced by a CSS variable of the page.
INK, MUTED, LINE, ACCENT, SECOND = "#0b0a01", "#0b0a02", "#0b0a03", "#0c0a01", "#0c0a02"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"}
_VARIABLES |= {f"#0c0a0{i}": f"s{i}" for i in range(1, COLORS + 1)}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Plot:
    """A finished plot."""

    title: str
    narrow: str
    """The <svg> element for a phone."""
    wide: str
    """The <svg> element for a desktop."""


@dataclass(frozen=True)
class Style:
    """How one version looks in every plot. Marker and line tell it apart without colour."""

    color: str
    marker: str
    line: str = "-"

    @property
    def look(self) -> dict[str, str]:
        """Return the style as matplotlib's keywords for a line."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.line}


def _look(style: Style) -> dict[str, Any]:
    return {"color": style.color, "marker": style.marker, "linestyle": style.line}


def styles_of(labels: Sequence[str], floors: Sequence[str] = ()) -> dict[str, Style]:
    """Choose a style for every version, the same in all plots; the noise floors get a dashed line in ink."""
    found = {}
    for index, label in enumerate(label for label in dict.fromkeys(labels) if label not in floors):
        line = ("-", "--", ":")[index // COLORS % 3]
        found[label] = Style(f"#0c0a0{index % COLORS + 1}", MARKERS[index % len(MARKERS)], line)
    return found | dict.fromkeys(floors, Style(INK, "s", "--"))


def draw(key: str, title: str, description: str, paint: Callable[[Figure], None]) -> Plot:
    """Draw a plot in both widths.

    key: prefix of its ids, unique within the page. description: read by screen readers after the title.
    paint: draws on an empty figure, whose width it must keep and whose height it must set.
    Raises InvalidRequestError if matplotlib is not installed.
    """
    with _matplotlib() as make:
        made = []
        for name, width in (("narrow", NARROW), ("wide", WIDE)):
            figure = make((width / 72, 1), dpi=72, layout="constrained")
            paint(figure)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
            made.append(_for_page(stream.getvalue(), f"{key}-{name}", title, description))
    return Plot(title, *made)


@functools.lru_cache(maxsize=4096)
def _letter_width(letter: str) -> float:
    """Width of one letter in font size 1; DejaVu is wider than most fonts that show a page."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    if unicodedata.east_asian_width(letter) in "WF":
        return 1.0
    font = FontProperties(family="DejaVu Sans", size=100)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # measured here, drawn by the page
        return float(TextToPath().get_text_width_height_descent(f"x{letter}x", font, False)[0]) / 100 - 1.18


def text_width(text: str, size: float = LETTER) -> float:
    """Estimate the most pixels that a text takes."""
    return size * sum(map(_letter_width, text))


def fitted(text: str, width: float, size: float = LETTER) -> str:
    """Shorten `text` to `width` pixels: both its ends with an ellipsis between."""
    if text_width(text, size) <= width:
        return text
    best = "…" if text_width("…", size) <= width else ""
    for kept in range(1, len(text)):
        end = kept // 3
        shorter = text[: kept - end].rstrip() + "…" + (text[-end:].lstrip() if end else "")
        if text_width(shorter, size) > width:
            break
        best = shorter
    return best


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """matplotlib's Figure under settings of our own: text stays text, `$` starts no formula, fixed ids."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidRequestError(
            "matplotlib, which draws the report's plots, is not installed",
            "Install it with: pip install 'lowmem[bench]'",
        ) from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # measured here, drawn by the page
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield Figure


_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lowmem",
    "text.parse_math": False,
    "text.color": INK,
    "font.family": "DejaVu Sans",
    "font.size": LETTER,
    "legend.fontsize": LETTER,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.75,
    "lines.markersize": 8,
    "patch.linewidth": 0,
    "axes.titlesize": LETTER,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.labelsize": LETTER,
    "axes.labelcolor": MUTED,
    "xaxis.labellocation": "right",
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    "grid.color": LINE,
    "grid.linewidth": 0.75,
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    **{f"{axis}tick.labelsize": FINE for axis in "xy"},
    **{f"{axis}tick.labelcolor": MUTED for axis in "xy"},
}


def _for_page(text: str, key: str, title: str, description: str) -> str:
    """matplotlib's SVG file as an element of an HTML page."""
    root = ElementTree.fromstring(text[text.index("<svg") :])
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):  # the style would apply to the whole page
                parent.remove(child)
    for element in root.iter():
        found: dict[str, Any] = element.attrib
        if "id" in found:
            found["id"] = f"{key}-{found['id']}"
        if _HREF in found:
            found["href"] = f"#{key}-{found.pop(_HREF)[1:]}"
        if "clip-path" in found:
            found["clip-path"] = found["clip-path"].replace("url(#", f"url(#{key}-")
        if "style" in found:
            style = re.sub(r"font-family: [^;]+;? ?", "", found["style"])
            found["style"] = re.sub(r"#0[bc]0a0\d", lambda m: f"var(--{_VARIABLES[m[0]]})", style)
        if "d" in found:
            found["d"] = re.sub(r"(\.\d\d)\d+", r"\1", found["d"]).replace("\n", "").strip()
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{key}-title {key}-desc")
    for place, (tag, words) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(_SVG + tag, {"id": f"{key}-{tag}"})
        element.text = words
        root.insert(place, element)
    ElementTree.register_namespace("", _SVG[1:-1])
    return ElementTree.tostring(root, encoding="unicode")
