"""The plots of a report, each drawn twice: for a phone and for everything wider."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.benchmarks.report.drawing import (
    ACCENT,
    FINE,
    FLOOR,
    INK,
    MUTED,
    NARROW,
    SECOND,
    WIDE,
    Sheet,
    Style,
    drawing,
    fitted,
    legend_height,
    style_of,
    text_width,
)
from lowmem.benchmarks.report.ticks import (
    apart,
    drawable,
    linear_places,
    linear_text,
    linear_ticks,
    log_places,
    log_text,
    log_ticks,
    margin_for,
    size_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Drawn:
    """A plot in its two widths, as <svg> elements."""

    title: str
    narrow: str
    wide: str


def drawn_twice(key: str, title: str, description: str, draw: Callable[[int], Sheet]) -> Drawn:
    """What `draw` makes of both widths."""
    with drawing():
        narrow = draw(NARROW).svg(f"{key}-narrow", title, description)
        wide = draw(WIDE).svg(f"{key}-wide", title, description)
    return Drawn(title, narrow, wide)


def styles_of(labels: Sequence[str], floors: Sequence[str] = ()) -> dict[str, Style]:
    """A style for every form, the same in all plots; the noise floor's is a broken line in ink."""
    ordinary = [label for label in dict.fromkeys(labels) if label not in floors]
    return {label: style_of(index) for index, label in enumerate(ordinary)} | dict.fromkeys(floors, FLOOR)


# --- points with names: quality against size ---------------------------------------------------------------


MOST_NAMES = 12
"""Points that a plot names; of more, all have the numbers of their rows."""


@dataclass(frozen=True)
class Point:
    """number: of the form's row in the table, for when its name finds no room."""

    label: str
    number: int
    x: float
    y: float
    error: float
    style: Style


def scatter(
    width: int, points: Sequence[Point], floors: Sequence[tuple[str, float]], x_name: str, y_name: str
) -> Sheet:
    """Points on two logarithmic axes, each with its name beside it or the number of its row."""
    shown = [p for p in points if drawable(p.x, log=True) and drawable(p.y)]
    floors = [(name, y) for name, y in floors if drawable(y, log=True)]
    height = 300 if width < WIDE else 400
    sheet = Sheet(width, height + 64)
    xs = [p.x for p in shown] or [1.0]
    ys = [y for y in [*(p.y for p in shown), *(y for _, y in floors)] if drawable(y, log=True)]
    low, high = min(ys, default=1e-4), max(ys, default=1e-3)
    # Zero has no place on a logarithmic axis: it lies on the lower edge, pointing down.
    bottom, top = low / (2.2 if min((p.y for p in shown), default=1) > 0 else 4), high * 2
    left = margin_for([log_text(tick) for tick in log_places(bottom, top)])
    axes = sheet.axes(left, 30, width - left - 8, height - 6)
    axes.set(xscale="log", yscale="log", xlim=(min(xs) / 1.12, max(xs) * 1.12), ylim=(bottom, top))
    log_ticks(axes, "y", bottom, top)
    size_ticks(axes, xs, width - left - 8)
    for _, y in floors:
        axes.axhline(y, color=INK, linestyle="--", linewidth=1.25)
    for p in shown:
        at = max(p.y, bottom)
        if p.y > p.error > 0:
            axes.errorbar([p.x], [at], yerr=[p.error], color=p.style.color, linewidth=1.25)
        marker = p.style.marker if p.y > 0 else "v"
        axes.plot(
            [p.x], [at], color=p.style.color, marker=marker, markersize=8, linestyle="none", clip_on=False
        )
    sheet.write(0, 14, y_name, color=MUTED)
    sheet.write(width, height + 60, x_name, color=MUTED, align="right")
    _name_points(sheet, axes, shown, floors, left, bottom)
    return sheet


def _name_points(
    sheet: Sheet,
    axes: Axes,
    points: Sequence[Point],
    floors: Sequence[tuple[str, float]],
    left: float,
    bottom: float,
) -> None:
    """Names where they cover no point, no other name and no edge; else the number of the table's row."""
    places = []
    for p in points:
        x, y = axes.transData.transform((p.x, max(p.y, bottom)))
        places.append((float(x), sheet.height - float(y)))
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in places]
    right = float(sheet.width)
    for name, y in floors:
        line = sheet.height - float(axes.transData.transform((1, y))[1])
        taken.append((left, line - 1, right, line + 1))
        text = fitted(name, sheet.width - 80, FINE)
        wide = text_width(text, FINE)
        spots = [
            (right - wide - 2 if at_right else left + 4, line + dy) for dy in (-5, 14) for at_right in (1, 0)
        ]
        free = (spot for spot in spots if _free((spot[0], spot[1] - 10, spot[0] + wide, spot[1] + 3), taken))
        spot = next(free, spots[0])
        taken.append((spot[0], spot[1] - 10, spot[0] + wide, spot[1] + 3))
        sheet.write(*spot, text, size=FINE, color=MUTED)
    for p, (x, y) in zip(points, places, strict=True):
        full = fitted(p.label, 170 if sheet.width >= WIDE else 110)
        for text in (full, str(p.number))[len(points) > MOST_NAMES :]:
            box = _room_for(text, x, y, taken, (left, 24.0, right, sheet.height - 42))
            if box:
                taken.append(box)
                sheet.write(box[0], box[3] - 3, text)
                break


Box = tuple[float, float, float, float]


def _room_for(text: str, x: float, y: float, taken: Sequence[Box], area: Box) -> Box | None:
    wide = text_width(text)
    for away in (0, 6, 14):
        for dx, dy in (
            (9 + away, 5.0),
            (-9 - away - wide, 5.0),
            (-wide / 2, -9.0 - away),
            (-wide / 2, 20.0 + away),
            (4 + away, -7.0 - away),
            (-4 - away - wide, -7.0 - away),
            (4 + away, 18.0 + away),
            (-4 - away - wide, 18.0 + away),
        ):
            box = (x + dx, y + dy - 11, x + dx + wide, y + dy + 3)
            inside = box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]
            if inside and _free(box, taken):
                return box
    return None


def _free(box: Box, taken: Sequence[Box]) -> bool:
    return not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
    )


# --- lines with a legend: confidence buckets, prompt lengths -----------------------------------------------


@dataclass(frozen=True)
class Series:
    """Values at places on the x axis; errors (below, above) or none."""

    label: str
    style: Style
    points: tuple[tuple[float, float], ...]
    errors: tuple[tuple[float, float], ...] = ()


def lines(
    width: int,
    series: Sequence[Series],
    ticks: Sequence[tuple[float, str]],
    x_name: str,
    y_name: str,
    *,
    log: bool,
) -> Sheet:
    """One line a series over evenly read places; legend below."""
    entries = [(s.label, s.style) for s in series]
    plot = 250 if width < WIDE else 320
    below = 46
    sheet = Sheet(width, math.ceil(30 + plot + below + 8 + legend_height(width, entries)))
    values = [y for s in series for _, y in s.points if drawable(y, log)]
    places = [x for x, _ in ticks] or [0.0]
    beside = 0.04 * (max(places) - min(places)) or 0.5
    first, last = min(places) - beside, max(places) + beside
    if log:
        bottom, top = min(values, default=1e-4) / 1.6, max(values, default=1e-3) * 1.6
        left = margin_for([log_text(tick) for tick in log_places(bottom, top)])
    else:
        both = [(y, more) for s in series for (_, y), (_, more) in zip(s.points, s.errors, strict=False)]
        highs = [y + more for y, more in both if drawable(y) and drawable(y + more)]
        bottom, top = 0.0, max([0.0, *values, *highs]) * 1.05 or 1.0
        left = margin_for([linear_text(tick) for tick in linear_places(bottom, top, 5)])
    axes = sheet.axes(left, 30, width - left - 8, plot)
    axes.set(xlim=(first, last), ylim=(bottom, top), yscale="log" if log else "linear")
    if log:
        log_ticks(axes, "y", bottom, top)
    else:
        linear_ticks(axes, "y", 5)
    pixel = (width - left - 8) / (last - first)
    named = apart([(x * pixel, text_width(text, FINE) + 8, (x, text)) for x, text in ticks])
    axes.set_xticks([x for x, _ in named], [text for _, text in named])
    for s in series:
        kept = [(x, max(y, bottom)) for x, y in s.points if drawable(y)]
        x, y = [x for x, _ in kept], [y for _, y in kept]
        for (at, value), around in zip(s.points, s.errors, strict=False):
            if drawable(value) and all(map(drawable, around)):
                ends = [max(value - around[0], bottom), value + around[1]]
                axes.plot([at, at], ends, color=s.style.color, linewidth=1.25)
        axes.plot(
            x,
            y,
            color=s.style.color,
            linestyle=s.style.line,
            marker=s.style.marker,
            markersize=7,
            clip_on=False,
        )
    sheet.write(0, 14, y_name, color=MUTED)
    sheet.write(width, 30 + plot + 36, x_name, color=MUTED, align="right")
    sheet.legend(30 + plot + below + 8, entries)
    return sheet


# --- rows: one bar, box or dot a form ----------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """marks: drawn on the row's axes at the height given in pixels. value: said beside it. remark: instead of
    marks, where there is nothing to draw."""

    label: str
    value: str
    marks: tuple[Mark, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Mark:
    """kind: "bar" from start to end, "second" (the same in the other colour), "outline", "line" (thin),
    "box" (a hollow bar), or "point" at end in the shape `marker`."""

    kind: str
    start: float
    end: float
    marker: str = "o"


@dataclass(frozen=True)
class Panel:
    """Rows under a heading."""

    title: str
    rows: tuple[Row, ...]


def row_chart(
    width: int,
    panels: Sequence[Panel],
    x_name: str,
    legend: Sequence[tuple[str, str]],
    *,
    log: bool = False,
    most: float | None = None,
) -> Sheet:
    """Horizontal bars. Wide: name, bar and value side by side; narrow: name and value above the bar."""
    wide = width >= WIDE
    row = 28 if wide else 42
    rows = [r for panel in panels for r in panel.rows]
    names = min(max((text_width(r.label) for r in rows), default=0), 0.3 * width) + 14 if wide else 0.0
    said = min(max((text_width(r.value) for r in rows), default=0), 0.35 * width) + 12 if wide else 0.0
    keys = legend_height(width, legend) + 8 if legend else 0.0
    heights = [(30 if panel.title else 4) + row * len(panel.rows) + 24 for panel in panels]
    sheet = Sheet(width, math.ceil(keys + sum(heights) + 24))
    sheet.legend(0, legend)
    limits = _limits([x for r in rows for m in r.marks for x in (m.start, m.end)], log, most)
    top = keys
    # Half a tick's label may stand out at both ends.
    inset = 14
    for panel, height in zip(panels, heights, strict=True):
        if panel.title:
            sheet.write(0, top + 20, fitted(panel.title, width), color=MUTED)
        start = top + (30 if panel.title else 4)
        span = width - names - said - 2 * inset
        axes = sheet.axes(names + inset, start, span, row * len(panel.rows))
        axes.set(ylim=(row * len(panel.rows), 0), xlim=limits, xscale="log" if log else "linear")
        axes.grid(False, axis="y")
        axes.set_yticks([])
        if log:
            log_ticks(axes, "x", *limits, most=max(3, int(span // 70)))
        else:
            linear_ticks(axes, "x", 4 if width < WIDE else 8)
        for index, one in enumerate(panel.rows):
            base = start + row * index
            if wide:
                sheet.write(0, base + 19, fitted(one.label, names - 12))
                sheet.write(width, base + 19, fitted(one.value, said - 12), align="right")
            else:
                value = fitted(one.value, 0.75 * width)
                sheet.write(0, base + 16, fitted(one.label, width - text_width(value) - 12))
                sheet.write(width, base + 16, value, align="right")
            center = row * index + (14 if wide else 30)
            if one.remark:
                text = fitted(one.remark, span, FINE)
                sheet.write(names + inset, start + center + 4, text, size=FINE, color=MUTED)
            for mark in one.marks:
                if drawable(mark.start, log) and drawable(mark.end, log):
                    _draw_mark(axes, mark, center)
        top += height
    sheet.write(width - said - inset, top + 14, x_name, color=MUTED, align="right")
    return sheet


def _draw_mark(axes: Axes, mark: Mark, y: float) -> None:
    from matplotlib.patches import Rectangle

    length = mark.end - mark.start
    if mark.kind == "bar":
        axes.add_patch(Rectangle((mark.start, y - 6), length, 12, facecolor=ACCENT, edgecolor="none"))
    elif mark.kind == "second":
        axes.add_patch(Rectangle((mark.start, y - 6), length, 12, facecolor=SECOND, edgecolor="none"))
    elif mark.kind in ("outline", "box"):
        half = 8 if mark.kind == "outline" else 6
        box = Rectangle((mark.start, y - half), length, 2 * half, facecolor="none", edgecolor=MUTED)
        axes.add_patch(box)
        box.set(clip_on=False, linewidth=1.25)
    elif mark.kind == "line":
        axes.plot([mark.start, mark.end], [y, y], color=INK, linewidth=1.25)
    else:
        axes.plot(
            [mark.end], [y], color=ACCENT, marker=mark.marker, markersize=8, linestyle="none", clip_on=False
        )


def _limits(values: Sequence[float], log: bool, most: float | None) -> tuple[float, float]:
    finite = [x for x in values if drawable(x, log)]
    if log:
        return min(finite, default=1.0) / 1.15, max(finite, default=10.0) * 1.15
    return 0.0, most or max([0.0, *finite]) * 1.03 or 1.0
