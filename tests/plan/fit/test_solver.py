"""The integer program against all combinations."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.errors import MemoryBudgetError
from lowmem.plan.fit.solver import Item, allocate

OPTION = st.tuples(
    st.one_of(st.just(math.inf), st.floats(0, 1, allow_subnormal=False)),
    st.integers(1, 40).map(lambda n: 64 * n),
)


@settings(max_examples=60, deadline=None)
@given(
    lists=st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_no_combination_within_the_budget_is_better(
    lists: list[list[tuple[float, int]]], share: float
) -> None:
    items = [
        Item(str(n), tuple(rise for rise, _ in options), tuple(size for _, size in options))
        for n, options in enumerate(lists)
        if any(math.isfinite(rise) for rise, _ in options)
    ]
    choices = [[o for o, rise in enumerate(item.rises) if math.isfinite(rise)] for item in items]
    sums = [
        (sum(i.sizes[o] for i, o in zip(items, chosen, strict=True)),
         sum(i.rises[o] for i, o in zip(items, chosen, strict=True)))
        for chosen in product(*choices)
    ]  # fmt: skip
    least, most = min(size for size, _ in sums), max(size for size, _ in sums)
    budget = least + int(share * (most - least))
    if not items:
        return
    taken = allocate(items, budget)
    size = sum(item.sizes[taken[item.name]] for item in items)
    rise = sum(item.rises[taken[item.name]] for item in items)
    best = min(rise for size, rise in sums if size <= budget)
    largest = max((item.rises[o] for item, own in zip(items, choices, strict=True) for o in own), default=0)
    assert size <= budget
    assert rise <= best * 1.001 + 1e-5 * largest
    with pytest.raises(MemoryBudgetError, match="smallest versions"):
        allocate(items, least - 1)
