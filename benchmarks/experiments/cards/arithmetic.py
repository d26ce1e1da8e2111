"""What counts and public figures imply: occupancy, bytes in flight, and the speed of decode on a card."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lowmem.benchmarks.experiments.cards.launches import FORMATS, Launch
from lowmem.benchmarks.experiments.cards.machine_code import (
    Code,
    bytes_ahead,
    counted,
    is_float,
    is_integer,
    is_narrow_load,
    is_wide_load,
    longest_first,
)
from lowmem.benchmarks.experiments.cards.record import Flight, Loop, Pace
from lowmem.benchmarks.experiments.cards.specs import (
    CARDS,
    FAMILIES,
    ISSUE_LANES,
    LATENCY_CLOCKS,
    REACHABLE,
    Card,
    Family,
)

CONTEXT = 2048
"""Tokens for which a version must fit into a card."""
LAUNCHED_WARPS = 8
"""Warps that choice.in_parts wants on every multiprocessor."""
_KINDS = 8
_REGISTERS = 1 << 16
"""Of an NVIDIA multiprocessor, given to warps in pieces of 256."""


def weights_a_pass(launch: Launch, family: Family) -> float:
    """Weights that a thread multiplies in a pass of the loop, by all rows."""
    threads = launch.constant("num_warps") * family.warp
    if launch.kernel.__name__ == "few_rows":
        return launch.constant("UNITS") * 32 * launch.constant("BLOCK") / threads
    return launch.constant("STEP") * launch.constant("BLOCK_N") / threads


def warps_held(family: Family, code: Code, warps: int) -> int:
    """Warps that a multiprocessor holds at once. warps: of a program."""
    if not family.shared:
        simds = 4 if family.warp == 64 else 2
        return code.waves * simds
    registers = warps * -(-code.registers * family.warp // 256) * 256
    held = min(
        family.programs,
        family.warps // warps,
        _REGISTERS // registers,
        family.shared // (code.shared + family.reserved or 1),
    )
    return held * warps


def loop_of(names: tuple[str, str, str, str, str], launch: Launch, code: Code) -> Loop:
    """The figures of a loop. names: target, launch, dtype, zero-points, format."""
    family = FAMILIES[names[0]]
    weights = weights_a_pass(launch, family)
    loads = sum(map(is_wide_load, code.instructions))
    if launch.kernel.__name__ == "few_rows":  # a compiler may have unrolled it: count the loads of a pass
        of_words = launch.constant("BITS") * weights / 128
        of_activations = 4 * launch.constant("ROWS") if family.backend == "hip" else 0
        weights *= max(1, round(loads / (of_words + of_activations + 1)))
    opcodes = counted(code.instructions)
    kinds = longest_first(opcodes, lambda opcode: opcode.split(".")[0])
    return Loop(
        *names,
        per_weight=_rounded(len(opcodes) / weights),
        floats=_rounded(sum(map(is_float, opcodes)) / weights),
        integers=_rounded(sum(map(is_integer, opcodes)) / weights),
        kinds=tuple((name, _rounded(count / weights)) for name, count in kinds[:_KINDS]),
        wide=loads,
        narrow=sum(map(is_narrow_load, code.instructions)),
        flushes=code.flushes,
        registers=code.registers,
        warps=warps_held(family, code, launch.constant("num_warps")),
        bytes_ahead=bytes_ahead(code.instructions),
    )


def slots(loop: Loop) -> float:
    """Issue slots of a weight: instructions, or more where one kind of unit has fewer lanes than are issued.

    A multiprocessor with 64 integer lanes executes an integer instruction in two of its four slots' clocks.
    """
    family = FAMILIES[loop.target]
    if family.backend == "hip":
        return loop.floats + loop.integers  # scalar instructions are issued beside them
    lanes = ISSUE_LANES["cuda"]
    integers = loop.integers * lanes / family.integer_lanes
    floats = loop.floats * lanes / family.float_lanes
    return max(loop.per_weight, integers, floats)


def issued(card: Card) -> float:
    """Instructions of single lanes that a card issues in a second."""
    return card.processors * ISSUE_LANES[FAMILIES[card.family].backend] * card.megahertz * 1e6


def flights(loops: Iterable[Loop]) -> Iterator[Flight]:
    """Of every card and format, decode of one row."""
    found = {(loop.target, loop.format): loop for loop in _decode(loops)}
    for card in CARDS:
        family = FAMILIES[card.family]
        needed = card.bandwidth * 1e9 / card.processors * LATENCY_CLOCKS / (card.megahertz * 1e6)
        for format in FORMATS:
            if loop := found.get((card.family, format)):
                a_warp = loop.bytes_ahead * family.warp
                yield Flight(card.name, format, round(needed), LAUNCHED_WARPS * a_warp, loop.warps * a_warp)


def paces(loops: Iterable[Loop], versions: Iterable[tuple[str, int, int, int, int]]) -> Iterator[Pace]:
    """Of every card and version of StarChat Alpha.

    versions: (format, weights of the linears, their bytes, all bytes that a token reads, bytes needed).
    """
    found = {(loop.target, loop.format): loop for loop in _decode(loops)}
    versions = list(versions)
    for card in CARDS:
        for format, weights, linear_bytes, all_bytes, needed_bytes in versions:
            if not (loop := found.get((card.family, format))):
                continue
            reached = REACHABLE * card.bandwidth * 1e9
            needed = slots(loop)
            reading, issuing = linear_bytes / reached, weights * needed / issued(card)
            seconds = max(reading, issuing) + (all_bytes - linear_bytes) / reached
            yield Pace(
                card.name,
                format,
                _rounded(issued(card) / (card.bandwidth * 1e9) * linear_bytes / weights),
                _rounded(needed),
                _rounded(1 / seconds),
                needed_bytes <= card.memory << 30,
            )


def _decode(loops: Iterable[Loop]) -> Iterator[Loop]:
    """Decode of one row, symmetric, in the dtype that its family's cards run."""
    for loop in loops:
        dtype = "float16" if loop.target == "sm_75" else "bfloat16"
        if (loop.launch, loop.zeros, loop.dtype) == ("decode, 1 row", "middle", dtype):
            yield loop


def _rounded(value: float) -> float:
    return round(value, 3)
