"""Which code multiplies how many rows, and how its programs divide the work: from a table, or by timing.

The number of rows decides the code (see `Choice`); a `DecodeShape` and a `PrefillShape` how it is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lowmem.kernels.contract import LinearSpec

FEW_ROWS = 4
"""Up to here rows go through few_rows (decode.py), and a row's bits do not depend on the others."""
TILE_ROWS = 16
"""Up to here rows go through many_rows (prefill.py) in one tile."""
DENSE_ROWS = 128
"""From here on a weight is dequantized into a scratch and multiplied densely, unless timing decides."""
SCRATCH_WEIGHTS = 1 << 24
"""Weights dequantized at a time, at most."""
MOST_PARTS = 16
"""Programs that share the inputs of an output, at most."""
UNIT = 32
"""Inputs that are packed together in every layout."""
_SCRATCH_BLOCK = 128


def scratch_columns(inputs: int, outputs: int) -> int:
    """Outputs that are dequantized at a time."""
    return min(outputs, max(_SCRATCH_BLOCK, SCRATCH_WEIGHTS // inputs // _SCRATCH_BLOCK * _SCRATCH_BLOCK))


@dataclass(frozen=True)
class DecodeShape:
    """How few_rows is launched."""

    block: int = 256
    """Outputs of a program."""
    warps: int = 4
    """Of 32 threads. Each takes a unit of 32 inputs at a time."""
    parts: int = 1
    """Programs that share the inputs of an output."""
    several: int = 0
    """Outputs of a program for 2 to FEW_ROWS rows, which take more registers; 0: `block`."""

    def outputs(self, rows: int) -> int:
        """Outputs of a program for `rows` rows. No row's bits depend on them."""
        return self.several if rows > 1 and self.several else self.block


@dataclass(frozen=True)
class PrefillShape:
    """How many_rows is launched."""

    rows: int
    """Of a program."""
    step: int = 64
    """Inputs a step."""
    block: int = 128
    """Outputs of a program."""
    warps: int = 4
    stages: int = 2
    """Steps that are in flight."""


@dataclass(frozen=True)
class Choice:
    """The launches of one linear, and where one code takes over from another."""

    decode: DecodeShape = DecodeShape()
    tile: PrefillShape = PrefillShape(rows=16)
    """For FEW_ROWS + 1 to TILE_ROWS rows."""
    prefill: PrefillShape = PrefillShape(rows=64)
    """For TILE_ROWS + 1 to dense_rows - 1 rows."""
    dense_rows: int = DENSE_ROWS

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choice:
        """The inverse of `dataclasses.asdict`. Raises TypeError or KeyError for anything else."""
        return cls(
            DecodeShape(**data["decode"]),
            PrefillShape(**data["tile"]),
            PrefillShape(**data["prefill"]),
            int(data["dense_rows"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def usual(spec: LinearSpec, multiprocessors: int) -> Choice:
    """The choice without timing. multiprocessors: of the card."""
    return Choice(in_parts(DecodeShape(), spec, multiprocessors))


def in_parts(shape: DecodeShape, spec: LinearSpec, multiprocessors: int) -> DecodeShape:
    """The shape in so many parts that every multiprocessor has 8 warps, while each warp has 8 units."""
    blocks = -(-spec.out_features // shape.block)
    units = -(-spec.in_features // UNIT)
    parts = 1
    while parts < MOST_PARTS and blocks * parts * shape.warps < 8 * multiprocessors:
        if units < 2 * parts * shape.warps * 8:
            break
        parts *= 2
    return replace(shape, parts=parts)


_DECODE = ((256, 4), (256, 8), (128, 4), (128, 8))
"""(block, warps) that `tuned` tries."""
_TILES = (
    PrefillShape(16),
    PrefillShape(16, block=64),
    PrefillShape(16, 128, 64),
    PrefillShape(16, stages=3),
    PrefillShape(16, 32, warps=8),
)
_PREFILLS = (
    PrefillShape(64),
    PrefillShape(64, 32, stages=3),
    PrefillShape(64, block=64),
    PrefillShape(32),
    PrefillShape(64, 32, warps=8),
)
"""What `tuned` tries. With 32 inputs and 8 warps no family runs out of registers: with 64 inputs and 4 warps
AMD's and sm_75, which has no matrix products in Triton, do (benchmarks/experiments/cards)."""
_DENSE = (32, 64, 128, 256)
_NEVER = 1 << 30


def tuned(spec: LinearSpec, multiprocessors: int, seconds: Callable[[Choice, int], float]) -> Choice:
    """The fastest launches.

    seconds: of a product with a choice and a number of rows; infinite where it fails.
    """
    best = usual(spec, multiprocessors)

    def fastest(candidates: Sequence[Choice], rows: int) -> Choice:
        return min(candidates, key=lambda choice: seconds(choice, rows))

    shapes = [in_parts(DecodeShape(block, warps), spec, multiprocessors) for block, warps in _DECODE]
    best = fastest([replace(best, decode=shape) for shape in shapes], 1)
    parts = [p for p in (1, 2, 4, 8, MOST_PARTS) if spec.in_features >= p * best.decode.warps * UNIT]
    best = fastest([replace(best, decode=replace(best.decode, parts=p)) for p in parts or [1]], 1)
    half = replace(best.decode, several=best.decode.block // 2)
    best = fastest([best, replace(best, decode=half)], FEW_ROWS)
    tiled = replace(best, dense_rows=_NEVER)
    tiled = fastest([replace(tiled, tile=shape) for shape in _TILES], TILE_ROWS)
    tiled = fastest([replace(tiled, prefill=shape) for shape in _PREFILLS], 64)
    dense = replace(tiled, dense_rows=TILE_ROWS)
    takes_over = [rows for rows in _DENSE if seconds(dense, rows) < seconds(tiled, rows)]
    return replace(tiled, dense_rows=min(takes_over, default=2 * _DENSE[-1]))
