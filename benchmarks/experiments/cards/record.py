"""What `cards` finds: the contents of results/cards.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lowmem.benchmarks.common.records import Origin

LIMITS = {"8-bit": 4.6, "6-bit": 6.0, "5-bit": 6.0, "4-bit": 5.0, "3-bit": 5.5, "2-bit": 4.0}
"""Instructions per weight that decode of one row may take on sm_86, by width; 7 bits have no goal."""
FAMILY_OF_LIMITS = "sm_86"


@dataclass(frozen=True)
class Built:
    """One launch, compiled for one target and every format."""

    target: str
    """As "sm_86" or "gfx1100"."""
    launch: str
    """See launches.CASES."""
    dtype: str
    """Of the activations."""
    zeros: str
    """"middle": all zero-points are the middle; "stored": they are read."""
    formats: tuple[str, ...]
    """As "4-bit gptq g128"."""
    registers: tuple[int, ...]
    """Of a thread, by format; 0 where it was not built."""
    shared: tuple[int, ...]
    """Bytes of shared memory of a program."""
    spilled: tuple[int, ...]
    """Bytes of a thread in memory, because registers ran out."""
    moved: tuple[float, ...]
    """Share of the loop's instructions that store spilled registers or load them again."""
    problems: tuple[tuple[str, str], ...] = ()
    """(format, why it was not built)."""


@dataclass(frozen=True)
class Loop:
    """The machine code of a kernel's loop over the inputs."""

    target: str
    launch: str
    dtype: str
    zeros: str
    format: str
    per_weight: float
    """Instructions of a thread for each weight that it multiplies, by all rows."""
    floats: float
    """Of them, on the units for floating point."""
    integers: float
    """Of them, logical operations, shifts and other integer arithmetic."""
    kinds: tuple[tuple[str, float], ...]
    """(opcode, per weight), the most frequent ones."""
    wide: int
    """128-bit loads in a pass of the loop."""
    narrow: int
    """Smaller loads of what each output has for itself: none for words."""
    flushes: int
    """Float instructions that treat subnormal numbers as zero."""
    registers: int
    warps: int
    """That a multiprocessor holds at once, by registers, shared memory and its own limits."""
    bytes_ahead: int
    """Of words and scales that a thread has asked for at most before it waits for the first of them."""


@dataclass(frozen=True)
class Flight:
    """Bytes in flight on one card, beside what its bandwidth needs (Little's law)."""

    card: str
    format: str
    needed: float
    """Bytes for each multiprocessor: bandwidth times latency."""
    of_launch: float
    """Bytes in flight with the warps that every launch has at least."""
    of_occupancy: float
    """Bytes in flight with all warps that fit."""


@dataclass(frozen=True)
class Pace:
    """What one card can decode with one version of StarChat Alpha: computed, not measured."""

    card: str
    format: str
    available: float
    """Instructions that the card issues while its memory delivers one weight and its share of the scale."""
    needed: float
    """Issue slots of a weight in few_rows; see arithmetic.slots."""
    tokens: float
    """A second, at the reachable share of the bandwidth."""
    fits: bool
    """Into its memory, with a context of CONTEXT tokens."""

    @property
    def memory_bound(self) -> bool:
        """Whether memory limits decode, rather than the number of instructions."""
        return self.needed <= self.available


@dataclass(frozen=True)
class CardsRecord:
    """`cards.json`."""

    origin: Origin
    triton: str
    built: tuple[Built, ...]
    loops: tuple[Loop, ...]
    flights: tuple[Flight, ...]
    paces: tuple[Pace, ...]

    def loop(
        self, target: str, launch: str, format: str, dtype: str = "", zeros: str = "middle"
    ) -> Loop | None:
        """The first loop that matches; dtype "": any."""
        return next(
            (
                loop
                for loop in self.loops
                if (loop.target, loop.launch, loop.format, loop.zeros) == (target, launch, format, zeros)
                and dtype in ("", loop.dtype)
            ),
            None,
        )


def missed(record: CardsRecord) -> Iterator[str]:
    """What a record does not keep: one line for each fault."""
    for built in record.built:
        yield from (f"{_case(built)}, {format}: {why}" for format, why in built.problems)
        for format, spilled, moved in zip(built.formats, built.spilled, built.moved, strict=True):
            if spilled:
                yield f"{_case(built)}, {format}: {spilled} bytes spilled, {moved:.1%} of the loop moves them"
    for loop in record.loops:
        case = f"{_case(loop)}, {loop.format}"
        limit = LIMITS.get(loop.format.split()[0])
        one_row = loop.target == FAMILY_OF_LIMITS and loop.launch == "decode, 1 row"
        if one_row and limit and loop.zeros == "middle" and loop.per_weight > limit:
            yield f"{case}: {loop.per_weight:.2f} instructions per weight, more than {limit}"
        if loop.flushes:
            yield f"{case}: subnormal numbers are treated as zero"
        if loop.launch.startswith("decode") and loop.zeros == "middle" and loop.narrow:
            yield f"{case}: {loop.narrow} loads are narrower than 128 bits"


def _case(found: Built | Loop) -> str:
    return f"{found.launch}, {found.dtype}, {found.zeros} zero-points, {found.target}"
