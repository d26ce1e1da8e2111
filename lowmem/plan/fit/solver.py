"""The allocation with the least predicted KL divergence within a number of bytes: an integer program.

Each linear takes one of its options; sizes add up, and so do the rises of the KL divergence. HiGHS (Huangfu
and Hall 2018) solves this multiple-choice knapsack to optimality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowmem.errors import MemoryBudgetError
from lowmem.text.units import format_bytes

_UNIT = 64
"""Sizes are counted in units of so many bytes, rounded up: the solver's tolerance is relative."""
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
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    usable = [_undominated(item) for item in items]
    pairs = [(item, option) for item, options in zip(items, usable, strict=True) for option in options]
    owner = [index for index, options in enumerate(usable) for _ in options]
    costs = np.array([item.rises[option] for item, option in pairs])
    sizes = np.array([-(-item.sizes[option] // _UNIT) for item, option in pairs], dtype=np.float64)
    column = np.arange(len(pairs))
    one_each = csr_array((np.ones(len(pairs)), (owner, column)), shape=(len(items), len(pairs)))
    found = milp(
        costs / (costs.max() or 1.0),
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(sizes[None]), -np.inf, budget // _UNIT),
        ],
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:  # the smallest options fit, so there is a solution
        raise RuntimeError(f"the integer program has no solution: {found.message}")
    result: dict[str, int] = {}
    for (item, option), taken in zip(pairs, found.x, strict=True):
        if taken > 0.5:
            result[item.name] = option
    return result


def _undominated(item: Item) -> list[int]:
    """The options that no smaller or equally large option beats, from the smallest to the largest."""
    order = sorted(range(len(item.sizes)), key=lambda o: (item.sizes[o], item.rises[o]))
    kept: list[int] = []
    for option in order:
        if math.isfinite(item.rises[option]) and (not kept or item.rises[option] < item.rises[kept[-1]]):
            kept.append(option)
    return kept
