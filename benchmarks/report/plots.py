"""The report's charts on matplotlib figures: points, lines, and rows of bars. See `svg.draw`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.report.numbers import significant
from lowmem.benchmarks.report.svg import ACCENT, FINE, INK, MUTED, SECOND, Style, fitted, text_width

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FARTHEST = 1e30
_LEGEND_LINE = 21


# --- points: quality against size --------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One version in a scatter plot; `error` is half of the error bar's length."""

    label: str
    x: float
    y: float
    error: float
    style: Style


def scatter(
    figure: Figure, points: Sequence[Point], floors: Sequence[tuple[str, float]], x_name: str, y_name: str
) -> None:
    """Draw points on two logarithmic axes, with a dashed line for each noise floor and a legend."""
    shown = [p for p in points if drawable(p.x, log=True) and drawable(p.y)]
    lines = [(name, y) for name, y in floors if drawable(y, log=True)]
    heights = [y for y in [*(p.y for p in shown), *(y for _, y in lines)] if drawable(y, log=True)]
    # Zero has no place on a logarithmic axis: it is drawn on the lower edge, pointing down.
    bottom = min(heights, default=1e-4) / (4 if any(p.y <= 0 for p in shown) else 2.2)
    entries = [(p.label, {"color": p.style.color, "marker": p.style.marker}) for p in points]
    entries += [(name, {"color": INK, "linestyle": "--"}) for name, _ in lines]
    axes = _axes(figure, 330, entries)
    xs = [p.x for p in shown] or [1.0]
    axes.set(xlim=(min(xs) / 1.12, max(xs) * 1.12), ylim=(bottom, max(heights, default=1e-3) * 2))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _set_ticks(axes.xaxis, log=2)
    _set_ticks(axes.yaxis, log=10)
    axes.set_title(y_name)
    axes.set_xlabel(x_name)
    for _, y in lines:
        axes.axhline(y, color=INK, linestyle="--", linewidth=1.25)
    for p in shown:
        at, marker = max(p.y, bottom), p.style.marker if p.y > 0 else "v"
        error = p.error if p.y > p.error > 0 else None
        axes.errorbar(p.x, at, error, color=p.style.color, marker=marker, elinewidth=1.25, clip_on=False)


# --- lines: by confidence, by prompt length ----------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One version's line: points (x, y), and how far their error bars reach (below, above)."""

    label: str
    style: Style
    points: tuple[tuple[float, float], ...]
    errors: tuple[tuple[float, float], ...] = ()


def lines(
    figure: Figure,
    series: Sequence[Series],
    ticks: Sequence[tuple[float, str]],
    names: tuple[str, str],
    *,
    log: bool,
) -> None:
    """Draw one line per series. ticks: of the x axis, (place, text). names: of both axes. log: the y axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    entries = [(s.label, s.style.look) for s in series]
    axes = _axes(figure, 330, entries)
    axes.set_yscale("log" if log else "linear")
    for s in series:
        errors = s.errors or ((0.0, 0.0),) * len(s.points)
        kept = [
            (x, y, *around)
            for (x, y), around in zip(s.points, errors, strict=False)
            if drawable(y, log) and all(drawable(y + length) for length in around)
        ]
        if kept:
            x, y, below, above = zip(*kept, strict=True)
            axes.errorbar(x, y, (below, above) if s.errors else None, elinewidth=1.25, **s.style.look)
    if not log:
        axes.set_ylim(0, None)
    places = dict(ticks)
    if len(places) > 1:
        beside = 0.04 * (max(places) - min(places))
        axes.set_xlim(min(places) - beside, max(places) + beside)
    axes.xaxis.set_major_locator(FixedLocator(sorted(places), nbins=width_of(figure) // 36))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: places.get(x, "")))
    _set_ticks(axes.yaxis, log=10 if log else 0)
    axes.set_xlabel(names[0])
    axes.set_title(names[1])


# --- rows: one bar or box a version ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One version in a bar chart; fields that are not set are not drawn."""

    label: str
    value: str
    """Text at the right end of the row."""
    bars: tuple[float, ...] = ()
    """Lengths of filled bars, one after the other."""
    outline: float = math.nan
    """Length of a hollow bar around them."""
    span: tuple[float, float] | None = None
    """Ends of a thin line."""
    box: tuple[float, float] | None = None
    """Ends of a hollow box."""
    points: tuple[float, ...] = ()
    """Places of markers, in the shapes of POINTS."""
    remark: str = ""
    """Text in place of a bar."""


@dataclass(frozen=True)
class Panel:
    """Rows under a heading."""

    title: str
    rows: tuple[Row, ...]


POINTS = ("o", "^", "D")
KEYS: dict[str, dict[str, Any]] = {
    "bar": {"facecolor": ACCENT},
    "second bar": {"facecolor": SECOND},
    "outline": {"facecolor": "none", "edgecolor": MUTED, "linewidth": 1.25},
    **{marker: {"color": ACCENT, "marker": marker} for marker in POINTS},
}
"""How the parts of a Row look, in rows and legends."""
_ROW = 42
"""Pixels: label and value above, the bar below."""


def rows(
    figure: Figure,
    panels: Sequence[Panel],
    x_name: str,
    legend: Sequence[tuple[str, str]],
    *,
    log: bool = False,
) -> None:
    """Draw horizontal bars under their labels, all panels on one x axis. legend: (name, key of KEYS)."""
    counts = [max(1, len(panel.rows)) for panel in panels]
    set_height(figure, _ROW * sum(counts) + 26 * len(panels) + 40, [(n, KEYS[k]) for n, k in legend])
    ratios = {"height_ratios": counts}
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, gridspec_kw=ratios)[:, 0]
    width = width_of(figure)
    if log:
        grid[0].set_xscale("log")
    for axes, panel, count in zip(grid, panels, counts, strict=True):
        axes.set(ylim=(count - 0.5, -0.5), yticks=[])
        if panel.title:
            axes.set_title(fitted(panel.title, width - 20))
        axes.grid(axis="x")
        for y, row in enumerate(panel.rows):
            value = fitted(row.value, 0.72 * width)
            label = fitted(row.label, width - text_width(value) - 40)
            beside = {"transform": axes.get_yaxis_transform(), "va": "baseline"}
            axes.text(0, y - 0.16, label, ha="left", **beside)
            axes.text(1, y - 0.16, value, ha="right", **beside)
            if row.remark:
                remark = fitted(row.remark, width - 30, FINE)
                axes.text(0, y + 0.28, remark, size=FINE, color=MUTED, **beside)
            _draw_row(axes, row, y + 0.18, log)
    values = [x for panel in panels for row in panel.rows for x in _places(row) if drawable(x, log)]
    if log:
        grid[0].set_xlim(min(values, default=1.0) / 1.15, max(values, default=10.0) * 1.15)
    else:
        grid[0].set_xlim(0, max(values, default=1.0) * 1.03 or 1.0)
    _set_ticks(grid[-1].xaxis, log=10 if log else 0)
    grid[-1].set_xlabel(x_name)


def _places(row: Row) -> list[float]:
    return [sum(row.bars), row.outline, *(row.span or ()), *(row.box or ()), *row.points]


def _draw_row(axes: Any, row: Row, y: float, log: bool) -> None:
    start = 0.0
    for length, key in zip(row.bars, ("bar", "second bar"), strict=False):
        if drawable(length):
            axes.barh(y, length, 0.28, start, **KEYS[key])
            start += length
    if drawable(row.outline):
        axes.barh(y, row.outline, 0.36, **KEYS["outline"])
    if row.span and all(drawable(x, log) for x in row.span):
        axes.plot(row.span, (y, y), color=INK, linewidth=1.25)
    if row.box and all(drawable(x, log) for x in row.box):
        axes.barh(y, row.box[1] - row.box[0], 0.28, row.box[0], **KEYS["outline"])
    for x, marker in zip(row.points, POINTS, strict=False):
        if drawable(x, log):
            axes.plot([x], [y], color=ACCENT, marker=marker, linestyle="none", clip_on=False)


# --- what all share ----------------------------------------------------------------------------------------


def drawable(value: float, log: bool = False) -> bool:
    """Whether a number has a place in a plot; one that is too large would leave all others in one point."""
    return math.isfinite(value) and abs(value) < FARTHEST and (not log or value > 1 / FARTHEST)


def width_of(figure: Figure) -> int:
    """Width of a figure in pixels."""
    return round(figure.get_figwidth() * 72)


def _axes(figure: Figure, height: float, entries: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    """One area for data, with a legend below it."""
    set_height(figure, height, entries)
    axes = figure.subplots()
    axes.grid()
    return axes


def set_height(figure: Figure, height: float, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Make the figure `height` pixels high and a legend more; `entries`: (name, look) of a line or a bar."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    width = width_of(figure)
    names = [fitted(name, width - 60) for name, _ in entries]
    columns = max(1, min(len(names), int(width // (max(map(text_width, names), default=0) + 54))))
    figure.set_figheight((height + _LEGEND_LINE * math.ceil(len(names) / columns) + 8 * bool(names)) / 72)
    if names:
        handles = [
            Patch(**look) if "facecolor" in look else Line2D([], [], **{"linestyle": "none", **look})
            for _, look in entries
        ]
        figure.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False)


def _set_ticks(axis: Axis, log: int) -> None:
    """Round numbers on an axis; log: its base, 0 for a linear one. Call it when the limits are set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if log:
        low, high = axis.get_view_interval()
        near = math.log(high / low, log) < 2.5
        axis.set_major_locator(LogLocator(log, {2: (1.0, 1.5), 10: (1.0, 2.0, 5.0) if near else (1.0,)}[log]))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def tick_text(value: float) -> str:
    """0.003, 2,000, 3×10⁻⁵."""
    if value == 0 or 1e-4 <= abs(value) < 1e12:
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return significant(value, 1).removeprefix("1×")
