"""The allocation with the least predicted KL divergence within a number of bytes: an integer program.

Each linear takes one of its options; sizes add up, and so do the rises of the KL divergence. HiGHS (Huangfu
and Hall 2018) solves this multiple-choice knapsack to optimality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowmem.errors import MemoryBudgetError, RecipeError
from lowmem.text.units import format_bytes

_UNIT = 64
"""Sizes are counted in units of so many bytes, rounded up, to keep numbers small for the solver."""
_GAP = 1e-4
"""Relative distance to the optimum at which the solver may stop."""


@dataclass(frozen=True)
class Item:
    """Something that takes exactly one of its options: a linear, or linears that must be stored alike."""

    name: str
    rises: tuple[float, ...]
    """Of the KL divergence, by option; infinity for one that cannot be taken."""
    sizes: tuple[int, ...]
    """Bytes, by option."""


def allocate(items: Sequence[Item], budget: int) -> Mapping[str, int]:
    """Return the option of each item with the least sum of rises whose sizes fit `budget` bytes.

    Raises MemoryBudgetError, which names the least that would be enough.
    """
    least = sum(min(s for s, r in zip(i.sizes, i.rises, strict=True) if math.isfinite(r)) for i in items)
    if least > budget:
        raise MemoryBudgetError(
            f"the smallest versions of the linears take {format_bytes(least)}, "
            f"and {format_bytes(max(0, budget))} are left for them",
            "Give a larger budget, or a shorter --context",
        )
    try:
        import highspy
    except ImportError as error:
        raise RecipeError(
            f"the solver of bit allocations cannot be loaded: {error}", "Install it with: pip install highspy"
        ) from error
    usable = [_undominated(item) for item in items]
    costs = [item.rises[o] for item, options in zip(items, usable, strict=True) for o in options]
    sizes = [-(-item.sizes[o] // _UNIT) for item, options in zip(items, usable, strict=True) for o in options]
    unit = max(costs, default=0.0) or 1.0
    solver = highspy.Highs()
    solver.silent()
    solver.setOptionValue("mip_rel_gap", _GAP)
    solver.setOptionValue("threads", 1)  # so that the result does not depend on the machine
    for index, cost in enumerate(costs):
        solver.addVar(0, 1)
        solver.changeColCost(index, cost / unit)
        solver.changeColIntegrality(index, highspy.HighsVarType.kInteger)
    first = 0
    for options in usable:
        columns = list(range(first, first + len(options)))
        solver.addRow(1, 1, len(columns), columns, [1.0] * len(columns))
        first += len(options)
    solver.addRow(-highspy.kHighsInf, budget // _UNIT, len(sizes), list(range(len(sizes))), sizes)
    solver.run()
    taken = list(solver.getSolution().col_value)
    result, first = {}, 0
    for item, options in zip(items, usable, strict=True):
        values = taken[first : first + len(options)]
        result[item.name] = options[values.index(max(values))]
        first += len(options)
    assert sum(item.sizes[result[item.name]] for item in items) <= budget
    return result


def _undominated(item: Item) -> list[int]:
    """The options that no smaller or equally large option beats, from the smallest to the largest."""
    order = sorted(range(len(item.sizes)), key=lambda o: (item.sizes[o], item.rises[o]))
    kept: list[int] = []
    for option in order:
        if math.isfinite(item.rises[option]) and (
            not kept or item.rises[option] < item.rises[kept[-1]]
        ):
            kept.append(option)
    return kept
