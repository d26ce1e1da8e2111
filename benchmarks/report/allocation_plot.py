"""Two heat maps of a version that was made for a size: bits of each linear, and how much it matters.

Rows are kinds of linear, columns decoder layers. The maps stand side by side where they fit, and otherwise
one above the other, in as many bands of layers as keep a number readable in its cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.benchmarks.report.plots import set_height, tick_text, width_of
from lowmem.benchmarks.report.svg import ACCENT, FINE, INK, LINE, SECOND, fitted, text_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 15
"""The least width of a cell in pixels: a digit, and space beside it."""
_HEIGHT = 22
"""Of a cell."""
_HEADING, _AXIS = 30, 26
"""Pixels above and below a map."""
_SHADES = (0.06, 0.6)
"""Opacity of 2 and of 8 bits: ink stays readable on the darkest."""
_DEPTHS = (0.06, 0.95)
"""Opacity of the least and the largest sensitivity, which have no text on them."""
_LEGEND = 5
"""The most sensitivities in the legend."""

Cells = Mapping[tuple[str, int], float]
"""Values by (kind of linear, decoder layer)."""


@dataclass(frozen=True)
class Maps:
    """What the two maps show; a linear that is missing leaves its cell empty."""

    kinds: tuple[str, ...]
    """The rows: names of linears inside their layers."""
    layers: tuple[int, ...]
    """The columns."""
    bits: Cells
    sensitivities: Cells
    """Nats, drawn on a logarithmic scale."""


def heat_maps(figure: Figure, maps: Maps) -> None:
    """Draw bits beside sensitivities, or above them where the figure is too narrow for that."""
    width, count = width_of(figure), len(maps.layers)
    names = [fitted(kind, 0.34 * width, FINE) for kind in maps.kinds]
    left = max((text_width(name, FINE) for name in names), default=0.0) + 14
    beside = count * _CELL <= (width - left - 40) / 2
    most = count if beside else max(1, int((width - left - 16) // _CELL))
    bands = max(1, math.ceil(count / most))
    wide = math.ceil(count / bands)

    drawn = (width - left - 40) / 2 if beside else width - left - 16
    step = _step(maps.layers, drawn / max(1, wide))
    scale = _Scale.of(maps.sensitivities.values())
    shape = (1, 2) if beside else (2 * bands, 1)
    height = shape[0] * (_HEIGHT * len(names) + _HEADING + _AXIS)
    widths = sorted({int(bits) for bits in maps.bits.values()})
    entries = [(f"{bits} bits", {"facecolor": ACCENT, "alpha": _shade(bits)}) for bits in widths]
    entries += [
        (tick_text(value), {"facecolor": SECOND, "alpha": scale.opacity(value)}) for value in scale.ticks
    ]
    set_height(figure, height, entries)
    grid = figure.subplots(*shape, squeeze=False, sharey=True).flat
    panels: tuple[tuple[str, Cells, str, Callable[[float], float]], ...] = (
        ("bits", maps.bits, ACCENT, _shade),
        ("sensitivity (nats), logarithmic", maps.sensitivities, SECOND, scale.opacity),
    )
    for place, axes in enumerate(grid):
        title, cells, color, opacity = panels[place % 2]
        first = place // 2 * wide
        layers = maps.layers[first : first + wide]
        _draw(axes, maps.kinds, layers, cells, (color, opacity))
        if place % 2 == 0:
            _write(axes, maps.kinds, layers, cells)
        axes.set(xlim=(-0.5, wide - 0.5), ylim=(len(names) - 0.5, -0.5))
        shown = [i for i, layer in enumerate(layers) if layer % step == 0]
        axes.set_xticks(shown, [str(layers[i]) for i in shown])
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
        axes.spines["bottom"].set_visible(False)
        if beside or place == len(grid) - 1:
            axes.set_xlabel("decoder layer")


@dataclass(frozen=True)
class _Scale:
    """A logarithmic scale of opacity over whole powers of ten."""

    low: int
    """The exponent of the faintest."""
    high: int

    @classmethod
    def of(cls, values: Any) -> _Scale:
        logs = [math.log10(value) for value in values if value > 0]
        low, high = math.floor(min(logs, default=-4)), math.ceil(max(logs, default=0))
        return cls(low, max(high, low + 1))

    @property
    def ticks(self) -> list[float]:
        """Powers of ten for the legend, few enough to be read."""
        step = math.ceil((self.high - self.low) / (_LEGEND - 1))
        return [10.0**exponent for exponent in range(self.low, self.high + 1, step)]

    def opacity(self, value: float) -> float:
        """0 for a value of 0, which has no place on the scale."""
        if value <= 0:
            return 0.0
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return _DEPTHS[0] + (_DEPTHS[1] - _DEPTHS[0]) * min(max(share, 0.0), 1.0)


def _shade(bits: float) -> float:
    share = min(max((bits - 2) / 6, 0.0), 1.0)
    return _SHADES[0] + (_SHADES[1] - _SHADES[0]) * share


def _step(layers: Sequence[int], cell: float) -> int:
    """Every how many layers a number fits below the cells, `cell` pixels wide."""
    needed = text_width(str(max(layers, default=0)), FINE) + 6
    return next((step for step in (1, 2, 5, 10, 20, 50) if step * cell >= needed), 100)


def _draw(
    axes: Any,
    kinds: Sequence[str],
    layers: Sequence[int],
    cells: Cells,
    look: tuple[str, Callable[[float], float]],
) -> None:
    """A rectangle for each value. look: its colour, and the opacity of a value."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    color, opacity = look
    found = [
        (x, y, cells[kind, layer])
        for y, kind in enumerate(kinds)
        for x, layer in enumerate(layers)
        if (kind, layer) in cells
    ]
    boxes = [Rectangle((x - 0.46, y - 0.46), 0.92, 0.92) for x, y, _ in found]
    colors = [to_rgba(color, opacity(value)) for *_, value in found]
    axes.add_collection(
        PatchCollection(boxes, facecolors=colors, edgecolors=LINE, linewidths=0.75, clip_on=False)
    )


def _write(axes: Any, kinds: Sequence[str], layers: Sequence[int], cells: Cells) -> None:
    """The number in each cell."""
    for y, kind in enumerate(kinds):
        for x, layer in enumerate(layers):
            if (kind, layer) in cells:
                text = f"{cells[kind, layer]:g}"
                found = axes.text(x, y, text, size=FINE, color=INK, ha="center", va="center_baseline")
                found.set_in_layout(False)  # thousands would make the layout slow
