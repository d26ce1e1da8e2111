"""Which code multiplies how many rows, and how its programs divide the work: from a table, or by timing.

The number of rows decides the code (see `Choice`); a `DecodeShape` and a `PrefillShape` how it is launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowmem.kernels.contract import LinearSpec

FEW_ROWS = 4
"""Up to here rows go through few_rows (decode.py), and a row's bits do not depend on the others."""
DENSE_ROWS = 128
"""From here on a weight is dequantized into a scratch and multiplied densely, unless timing decides."""
SCRATCH_WEIGHTS = 1 << 24
"""Weights dequantized at a time, at most."""
MOST_PARTS = 16
"""Programs that share the inputs of an output, at most."""
_SCRATCH_BLOCK = 128
UNIT = 32


def scratch_columns(inputs: int, outputs: int) -> int:
    """Outputs that are dequantized at a time."""
    return min(outputs, max(_SCRATCH_BLOCK, SCRATCH_WEIGHTS // inputs // _SCRATCH_BLOCK * _SCRATCH_BLOCK))


@dataclass(frozen=True)
class DecodeShape:
    """How few_rows is launched."""

    block: int = 256
    """Outputs of a program."""
    warps: int = 4
    units: int = 4
    """Units of 32 inputs that a program reads at a time: one for each warp."""
    parts: int = 1
    """Programs that share the inputs of an output."""


@dataclass(frozen=True)
class PrefillShape:
    """How many_rows is launched."""

    step: int = 64
    """Inputs a step."""
    rows: int = 16
    block: int = 128
    """Outputs of a program."""
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Choice:
    """The launches of one linear, and where one code takes over from another."""

    decode: DecodeShape
    few: PrefillShape
    """For FEW_ROWS + 1 to 16 rows."""
    prefill: PrefillShape
    """For 17 to dense_rows - 1 rows."""
    dense_rows: int = DENSE_ROWS


def usual(spec: LinearSpec, multiprocessors: int) -> Choice:
    """The choice without timing. multiprocessors: of the card."""
    return Choice(decode_shape(spec, multiprocessors), PrefillShape(), PrefillShape(rows=64))


def decode_shape(spec: LinearSpec, multiprocessors: int) -> DecodeShape:
    """Enough programs for 8 warps on every multiprocessor, each with 8 steps at least."""
    usual = DecodeShape()
    blocks = -(-spec.out_features // usual.block)
    wanted = -(-2 * multiprocessors // blocks)
    units = -(-spec.in_features // UNIT)
    most = max(1, units // (8 * usual.units))
    parts = 1
    while parts < min(wanted, most, MOST_PARTS):
        parts *= 2
    return DecodeShape(parts=parts)


def decode_shapes(spec: LinearSpec) -> list[DecodeShape]:
    """What `timed` tries."""
    units = -(-spec.in_features // UNIT)
    found = []
    for block, warps in ((128, 4), (128, 8), (256, 4), (256, 8), (512, 8)):
        for parts in (1, 2, 4, 8, MOST_PARTS):
            if parts == 1 or units >= parts * warps:
                found.append(DecodeShape(block, warps, warps, parts))
    return found


def as_json(choice: Choice) -> dict[str, Any]:
    """For the cache's file."""
    from dataclasses import asdict

    return asdict(choice)


def from_json(data: dict[str, Any]) -> Choice:
    """Raises TypeError and KeyError for anything but what `as_json` returns."""
    return Choice(
        DecodeShape(**data["decode"]),
        PrefillShape(**data["few"]),
        PrefillShape(**data["prefill"]),
        data["dense_rows"],
    )
