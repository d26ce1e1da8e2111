"""Where a plot's axes are marked, and how the marks are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from lowmem.benchmarks.report.drawing import FINE, text_width
from lowmem.benchmarks.report.numbers import count, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")
BITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
FARTHEST = 1e30


def drawable(value: float, log: bool = False) -> bool:
    """Whether a number has a place in a plot: none that is no number, and none that would leave all others in
    one point. Tables have them all."""
    return math.isfinite(value) and abs(value) < FARTHEST and (not log or value > 1 / FARTHEST)


def log_ticks(axes: Axes, which: str, low: float, high: float, most: int = 8) -> None:
    """What `log_places` finds, on one axis."""
    ticks = log_places(low, high, most)
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_ticks(ticks, [log_text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def log_places(low: float, high: float, most: int = 8) -> list[float]:
    """Powers of ten; where they are few, steps between them; where they are many, not all."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps: list[tuple[int, tuple[float, ...]]] = [
        (1, (1, 1.5, 2, 3, 4, 5, 6, 8)),
        (1, (1, 2, 5)),
        (1, (1, 3)),
    ]
    steps += [(every, (1,)) for every in range(1, last - first + 1)]
    places: list[float] = []
    for every, factors in steps:
        places = [f * 10.0**power for power in range(first, last + 1, every) for f in factors]
        places = [place for place in places if low <= place <= high]
        if len(places) <= most:
            break
    return places


def log_text(tick: float) -> str:
    """0.003, 10⁻⁵, 3×10⁻⁵, 20."""
    if 1e-4 <= tick < 1e5:
        return f"{tick:.4f}".rstrip("0").rstrip(".") if tick < 1e3 else count(round(tick))
    return significant(tick, 1).removeprefix("1×")


def linear_ticks(axes: Axes, which: str, parts: int) -> None:
    """What `linear_places` finds between an axis's ends."""
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    ticks = linear_places(low, high, parts)
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_ticks(ticks, [linear_text(tick) for tick in ticks])


def linear_places(low: float, high: float, parts: int) -> list[float]:
    """At most so many round steps between two numbers."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(parts, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in found if low <= tick <= high]


def linear_text(tick: float) -> str:
    """0.25, 40, 2,000."""
    return count(round(tick)) if 1e3 <= tick < 1e15 else f"{tick:g}"


def margin_for(labels: Sequence[str]) -> float:
    """Pixels to the left of an axis that hold these labels of its ticks."""
    return max((text_width(label, FINE) for label in labels), default=20.0) + 8


def size_ticks(axes: Axes, values: Sequence[float], room: float) -> None:
    """Bits per weight on a logarithmic x axis of `room` pixels, as many as have room."""
    low, high = axes.get_xlim()
    inside: Sequence[float] = [c for c in BITS if low <= c <= high] or sorted(set(values))[:3]
    scale = room / math.log(high / low)
    kept = apart([(math.log(x / low) * scale, text_width(f"{x:g}", FINE) + 8, x) for x in inside])
    axes.set_xticks(kept, [f"{x:g}" for x in kept])
    axes.set_xticks([], minor=True)


def apart(placed: Sequence[tuple[float, float, T]]) -> list[T]:
    """Of (pixel, width, what) those that do not touch the one before, the first and as many as can be."""
    kept: list[T] = []
    end = -math.inf
    for x, width, what in sorted(placed, key=lambda one: one[0]):
        if x - width / 2 >= end:
            kept.append(what)
            end = x + width / 2
    return kept
