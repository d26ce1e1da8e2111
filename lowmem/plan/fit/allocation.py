"""The bits of every linear of a model, chosen for a size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lowmem.checkpoint.formats import LinearFormat, packed_bytes
from lowmem.errors import MemoryBudgetError
from lowmem.plan.fit.sensitivities import OPTIONS, Sensitivities
from lowmem.plan.fit.solver import Item, allocate


@dataclass(frozen=True)
class Allocation:
    """How each linear is stored, and what that is predicted to cost."""

    linears: Mapping[str, LinearFormat]
    """By full name."""
    predicted_kld: float
    """The KL divergence from the unquantized model, in nats a token."""
    nbytes: int
    """Of the packed linears."""
    bits_per_weight: float
    """Average, with scales and zero-points."""
    costs: Mapping[str, float]
    """What each linear adds to `predicted_kld`."""
    sensitivities: Mapping[str, float]
    """What each linear would add at 4 bits in the largest groups, to compare linears with."""
    head_bits: int = 16
    """Of the head and the token embedding in memory, for which the size was computed."""

    @property
    def default(self) -> LinearFormat:
        """The format of most linears."""
        return Counter(self.linears.values()).most_common(1)[0][0]


OF_CHOICE = 1.3
"""By what factor a mixture's KL divergence exceeds the sum over its linears: options that look cheapest are
often those whose cost is estimated too low. On tiny-starchat it was 1.2 to 1.4 from 2.2 to 4.6 bits a weight:
`python -m lowmem.benchmarks.experiments.curve`."""
HEAD_KLD = 7.3e-5
"""The rise of the KL divergence where head and embedding are rounded to 8 bits, as measured on tiny-starchat:
`python -m lowmem.benchmarks.experiments.head_bits`."""


def best_of_heads(left: Mapping[int, int], allocate: Callable[[int], Allocation]) -> Allocation:
    """The allocation with the least predicted KL divergence, the head's included.

    left: bytes for the linears, by the bits of the head. allocate: the best allocation for that many. Raises
    the MemoryBudgetError of the last one if none succeeds.
    """
    found: list[Allocation] = []
    failure: MemoryBudgetError | None = None
    for head_bits, nbytes in left.items():
        try:
            made = allocate(nbytes)
        except MemoryBudgetError as error:
            failure = error
            continue
        cost = 0.0 if head_bits == 16 else HEAD_KLD
        found.append(replace(made, head_bits=head_bits, predicted_kld=made.predicted_kld + cost))
    if not found:
        assert failure
        raise failure
    return min(found, key=lambda made: made.predicted_kld)


def best_allocation(
    found: Sensitivities,
    budget: int,
    *,
    allows: Callable[[LinearFormat], bool] = lambda _: True,
    alike: Iterable[Sequence[str]] = (),
) -> Allocation:
    """The allocation with the least predicted KL divergence whose packed linears take at most `budget` bytes.

    allows: whether a reader takes a format. alike: linears, by full name, that must be stored alike. Raises
    MemoryBudgetError, naming the least that would be enough.
    """
    together = {name: tuple(names) for names in alike for name in names if name in found.linears}
    groups = dict.fromkeys(together.get(name, (name,)) for name in found.linears)
    items = []
    for names in groups:
        members = [name for name in names if name in found.linears]
        rises = _worthwhile(
            [
                sum(found.predicted(name, i) for name in members) if allows(option) else math.inf
                for i, option in enumerate(OPTIONS)
            ]
        )
        sizes = tuple(sum(packed_bytes(*found.linears[n], option) for n in members) for option in OPTIONS)
        items.append((members, Item(members[0], rises, sizes)))
    taken = allocate([item for _, item in items], budget)
    chosen = {name: taken[item.name] for members, item in items for name in members}
    linears = {name: OPTIONS[chosen[name]] for name in found.linears}
    uniform = len(set(linears.values())) == 1
    return Allocation(
        linears,
        (1.0 if uniform else OF_CHOICE) * sum(found.predicted(name, o) for name, o in chosen.items()),
        sum(packed_bytes(*found.linears[name], format) for name, format in linears.items()),
        bits_per_weight(found.linears, linears),
        {name: found.predicted(name, option) for name, option in chosen.items()},
        {name: found.at_four_bits(name) for name in chosen},
    )


def _worthwhile(rises: list[float]) -> tuple[float, ...]:
    """Rises by option, without 8 bits in smaller groups than necessary.

    They would gain less than the rounding of 16-bit arithmetic costs.
    """
    finite = [o.group_size for o, rise in zip(OPTIONS, rises, strict=True) if o.bits == 8 and rise < math.inf]
    return tuple(
        math.inf if option.bits == 8 and option.group_size < max(finite, default=0) else rise
        for option, rise in zip(OPTIONS, rises, strict=True)
    )


def bits_per_weight(sizes: Mapping[str, tuple[int, int]], linears: Mapping[str, LinearFormat]) -> float:
    """Average bits of a weight, with its share of scale and zero-point. sizes: (inputs, outputs)."""
    bits = weights = 0.0
    for name, format in linears.items():
        inputs, outputs = sizes[name]
        weights += inputs * outputs
        bits += inputs * outputs * format.bits_per_weight(inputs)
    return bits / weights
