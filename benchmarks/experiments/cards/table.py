"""results/cards.json as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowmem.benchmarks.experiments.cards.record import (
    FAMILY_OF_LIMITS,
    LIMITS,
    Built,
    CardsRecord,
    Loop,
    missed,
)
from lowmem.benchmarks.experiments.cards.specs import CARDS, LATENCY_CLOCKS, REACHABLE
from lowmem.benchmarks.experiments.common import cell, made_with, table

_ONE = "decode, 1 row"


def render(record: CardsRecord) -> str:
    """The tables, and what they were made with."""
    parts = [_built(record), _loops(record), _flights(record), _paces(record), _notes(record)]
    return "\n\n".join(part for part in parts if part)


def _built(record: CardsRecord) -> str:
    """Registers and spills by family."""
    launches = list(dict.fromkeys(one.launch for one in record.built))
    shown = [
        name for name in launches if "odd" not in name and "shared" not in name and name != "decode, 2 rows"
    ]
    rows = []
    for target in dict.fromkeys(one.target for one in record.built):
        of_target = [one for one in record.built if one.target == target]
        kernels = sum(len(one.formats) for one in of_target)
        failed = sum(len(one.problems) for one in of_target)
        spilled = max(max(one.spilled) for one in of_target)
        cells = [_range(one for one in of_target if one.launch == name) for name in shown]
        rows.append([target, f"{kernels - failed} of {kernels}", *cells, str(spilled)])
    heads = [
        "family",
        "built",
        *(f"registers: {name}" for name in shown),
        "bytes spilled, at most",
    ]
    return table(heads, rows) if rows else ""


def _range(found: Iterator[Built]) -> str:
    numbers = [number for one in found for number in one.registers if number]
    return f"{min(numbers)} to {max(numbers)}" if numbers else ""


def _loops(record: CardsRecord) -> str:
    """Instructions per weight of the family that has limits."""
    family = FAMILY_OF_LIMITS
    rows = []
    for format in dict.fromkeys(loop.format for loop in record.loops if loop.target == family):
        one = record.loop(family, _ONE, format, "bfloat16")
        others = (
            record.loop(family, _ONE, format, "float16"),
            record.loop(family, _ONE, format, "bfloat16", "stored"),
            record.loop(family, "decode, 2 rows", format, "bfloat16"),
            record.loop(family, "decode, 4 rows", format, "bfloat16"),
            record.loop(family, "5 to 16 rows", format, "bfloat16", "stored"),
        )
        if one is None:
            continue
        limit = LIMITS.get(format.split()[0])
        kinds = ", ".join(f"{name} {share:.2f}" for name, share in one.kinds[:4])
        rows.append([
            format, f"{limit:.1f}" if limit else "", f"{one.per_weight:.2f}", *map(_per_weight, others),
            str(one.registers), kinds,
        ])  # fmt: skip
    heads = [
        f"instructions per weight, {family}", "limit", "1 row", "float16", "zero-points", "2 rows", "4 rows",
        "5 to 16 rows", "registers, 1 row", "most frequent, 1 row",
    ]  # fmt: skip
    return table(heads, rows) if rows else ""


def _per_weight(loop: Loop | None) -> str:
    return f"{loop.per_weight:.2f}" if loop else ""


def _flights(record: CardsRecord) -> str:
    """Bytes in flight, by card: of the formats with the fewest."""
    rows = []
    for card in dict.fromkeys(flight.card for flight in record.flights):
        found = [flight for flight in record.flights if flight.card == card]
        least = min(found, key=lambda flight: flight.of_launch)
        most = min(found, key=lambda flight: flight.of_occupancy)
        rows.append([
            card, f"{least.needed / 1024:.1f}", f"{least.of_launch / 1024:.1f} ({least.format})",
            f"{most.of_occupancy / 1024:.1f} ({most.format})",
        ])  # fmt: skip
    heads = ["KiB in flight per multiprocessor", "needed", "8 warps, least", "all that fit, least"]
    return table(heads, rows) if rows else ""


def _paces(record: CardsRecord) -> str:
    """What each card can issue, and the expected speed."""
    formats = list(dict.fromkeys(pace.format for pace in record.paces))
    if not formats:
        return ""
    found = {(pace.card, pace.format): pace for pace in record.paces}
    rates, tokens = [], []
    for card in CARDS:
        paces = [found.get((card.name, format)) for format in formats]
        if not any(paces):
            continue
        numbers = f"{card.processors} × {card.megahertz} MHz, {card.bandwidth} GB/s, {card.memory} GB"
        rates.append([
            card.name, numbers, *(f"{p.available:.1f} / {p.needed:.1f}" if p else "" for p in paces)
        ])  # fmt: skip
        tokens.append([
            card.name, *((f"{p.tokens:.0f}{'' if p.memory_bound else ' *'}" if p.fits else "–") if p else ""
                         for p in paces),
        ])  # fmt: skip
    names = [" ".join(format.split()[::2]) for format in formats]
    return (
        table(["instructions a weight: issued / needed", "card", *names], rates)
        + "\n\n"
        + table(["tokens/s, computed, not measured", *names], tokens)
    )


def _notes(record: CardsRecord) -> str:
    faults: Sequence[str] = [*missed(record)]
    lines = [
        made_with(record.origin, [("triton", record.triton)]),
        f"Needed in flight: bandwidth times {LATENCY_CLOCKS} clocks. Tokens/s: StarChat Alpha with a 16-bit "
        f"head at {REACHABLE:.0%} of the nominal bandwidth, without the time of launches, attention and "
        "sampling. –: does not fit. *: limited by instructions.",
        *(f"Missed: {cell(fault)}." for fault in faults),
    ]
    return "\n".join(lines)
