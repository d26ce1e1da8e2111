"""Plots as inline SVG: drawn by matplotlib in CSS pixels, coloured by the page.

Everything is placed in pixels from the top left corner of a sheet that is as wide as the page shows it, so a
13-pixel letter is 13 pixels. Colours are CSS variables (light and dark follow the page), letters are text in
the page's own font, ids are unique to the sheet, and the same input gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LETTER = 13
"""Pixels of a letter's size; FINE of the smallest."""
FINE = 12
NARROW, WIDE = 328, 900
"""Sheets for a phone of 360 pixels less its margins, and for everything wider than a phone."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
SERIES = 8
# matplotlib wants colours. These are names: each becomes a CSS variable of the page.
INK, MUTED, LINE, PAPER, ACCENT, SECOND = (f"#0b0a0{i}" for i in range(1, 7))
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", ACCENT: "s1", SECOND: "s2"}
_VARIABLES |= {f"#0c0a0{i}": f"s{i}" for i in range(1, SERIES + 1)}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Style:
    """How a form looks in every plot: a colour and, for who does not see it, a shape and a kind of line."""

    color: str
    marker: str
    line: str = "-"


def style_of(index: int) -> Style:
    """The style of the form number `index`; 56 pairs of colour and shape before one comes again."""
    color = f"#0c0a0{index % SERIES + 1}"
    return Style(color, MARKERS[index % len(MARKERS)], ("-", "--", ":")[index // SERIES % 3])


FLOOR = Style(INK, "s", "--")


class Sheet:
    """A drawing of `width` by `height` pixels."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure((width / 72, height / 72), dpi=72)
        self.layer = self.axes(0, 0, width, height)
        """Spans the sheet; its coordinates are pixels from the top left corner."""
        self.layer.set(xlim=(0, width), ylim=(height, 0))
        self.layer.axis("off")
        self.layer.set_zorder(2)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """An area for data, without frame; a line below it."""
        share = (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )
        axes = self.figure.add_axes(share)
        axes.patch.set_visible(False)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.tick_params(length=0, labelsize=FINE, labelcolor=MUTED, pad=4)
        axes.set_axisbelow(True)
        axes.grid(color=LINE, linewidth=0.75)
        return axes

    def write(
        self, x: float, y: float, text: str, *, size: int = LETTER, color: str = INK, align: str = "left"
    ) -> None:
        """Text on the base line y."""
        self.layer.text(x, y, text, size=size, color=color, ha=align, va="baseline", clip_on=False)

    def legend(self, top: float, entries: Sequence[tuple[str, Style | str]]) -> None:
        """Lines of key and name from `top` on; as high as `legend_height` says."""
        for x, y, name, key in _flow(self.width, entries):
            base = top + y
            if isinstance(key, Style):
                self.layer.plot([x, x + 22], [base, base], color=key.color, linestyle=key.line)
                self.layer.plot([x + 11], [base], color=key.color, marker=key.marker, markersize=7)
            else:
                draw_key(self.layer, key, x, base)
            self.write(x + 28, base + 4.5, name)

    def svg(self, key: str, title: str, description: str) -> str:
        """The drawing as an <svg> element with a title and a description for who cannot see it; `key` sets
        its ids apart from those of other drawings in the page."""
        stream = io.StringIO()
        self.figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
        return _for_page(stream.getvalue(), key, title, description)


def draw_key(axes: Axes, kind: str, x: float, y: float) -> None:
    """A key that is a piece of a bar: "solid", "second" or "outline"."""
    from matplotlib.patches import Rectangle

    look: dict[str, dict[str, Any]] = {
        "solid": {"facecolor": ACCENT, "edgecolor": "none"},
        "second": {"facecolor": SECOND, "edgecolor": "none"},
        "outline": {"facecolor": "none", "edgecolor": MUTED, "linewidth": 1.25},
    }
    if kind in look:
        axes.add_patch(Rectangle((x + 1, y - 5), 20, 10, **look[kind]))
    else:  # a marker of its own
        axes.plot([x + 11], [y], color=ACCENT, marker=kind, markersize=8, linestyle="none")


def _flow(
    width: float, entries: Sequence[tuple[str, Style | str]]
) -> Iterator[tuple[float, float, str, Style | str]]:
    """(x, y, name, key): entries side by side in columns as wide as the widest, line after line."""
    names = [fitted(name, width - 40) for name, _ in entries]
    widest = max((text_width(name) for name in names), default=0) + 28 + 18
    columns = max(1, min(len(names), int((width + 18) // widest)))
    for index, (name, (_, key)) in enumerate(zip(names, entries, strict=True)):
        yield widest * (index % columns), 10 + 20 * (index // columns), name, key


def legend_height(width: float, entries: Sequence[tuple[str, Style | str]]) -> float:
    """Pixels that `Sheet.legend` takes."""
    return max((y + 10 for _, y, _, _ in _flow(width, entries)), default=0.0)


@functools.lru_cache(maxsize=4096)
def _letter_width(letter: str) -> float:
    """Of one letter in a size of 1. DejaVu is wider than nearly all that a page may be shown in."""
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.0
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    font.set_size(100, 72)
    index = font.get_char_index(ord(letter))
    if not index:
        return 1.0  # drawn by whatever font the reader's machine has for it
    return float(font.load_glyph(index).horiAdvance) / 64 / 100


def text_width(text: str, size: float = LETTER) -> float:
    """Pixels of a text, rather too many than too few."""
    return size * sum(map(_letter_width, text))


def fitted(text: str, width: float, size: float = LETTER) -> str:
    """`text`, or as much of its two ends as `width` pixels hold with an ellipsis between."""
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
def drawing() -> Iterator[None]:
    """matplotlib as it comes, whatever the user's own settings: text stays text, `$` is no formula, and ids
    do not depend on the moment."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that DejaVu lacks is only measured with it, never drawn.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "lowmem",
                "text.parse_math": False,
                "font.family": "DejaVu Sans",
                "lines.solid_capstyle": "butt",
                "lines.linewidth": 1.75,
            }
        )
        yield


def _for_page(text: str, key: str, title: str, description: str) -> str:
    """matplotlib's file as an element of an HTML page."""
    root = ElementTree.fromstring(text.partition("<svg")[1] + text.partition("<svg")[2])
    parents = [(parent, child) for parent in root.iter() for child in parent]
    for parent, child in parents:
        # Who made it is in the page already; its style sheet would hold for the whole page.
        if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
            parent.remove(child)
    used = {
        name for element in root.iter() for value in element.attrib.values() for name in _references(value)
    }
    for element in root.iter():
        _for_page_element(element, key, used)
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


def _references(value: str) -> list[str]:
    return [first or second for first, second in re.findall(r"^#(.+)$|url\(#([^)]+)\)", value)]


def _for_page_element(element: ElementTree.Element, key: str, used: set[str]) -> None:
    attributes: dict[str, Any] = element.attrib
    name = attributes.pop("id", None)
    if name in used:
        attributes["id"] = f"{key}-{name}"
    if _HREF in attributes:
        attributes["href"] = f"#{key}-{attributes.pop(_HREF)[1:]}"
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{key}-")
    if "style" in attributes:
        style = re.sub(r"font-family: [^;]+;? ?", "", attributes["style"])
        attributes["style"] = re.sub(r"#0[bc]0a0\d", lambda m: f"var(--{_VARIABLES[m[0]]})", style)
    if "transform" in attributes and attributes["transform"].startswith("rotate(-0 "):
        del attributes["transform"]  # a turn by nothing
    if "d" in attributes:
        attributes["d"] = re.sub(r"(\.\d\d)\d+", r"\1", attributes["d"]).replace("\n", "").strip()
