"""How an embedding or a head is held in 8 bits: its groups and its bytes. Needs no torch.

Files keep both in 16 bits. They are rounded to 8 bits when a model is loaded (quantized_tables.py).
"""

from __future__ import annotations

from lowmem.config import GROUP_SIZES

TILE_ROWS = 64
"""Rows are padded to whole tiles: see LM_TILE_OUTPUTS of csrc/linear/linear.h."""


def table_group(columns: int) -> int | None:
    """Columns that share a scale; None for a table that cannot be held in 8 bits."""
    return next((group for group in GROUP_SIZES if columns and columns % group == 0), None)


def table_bytes(rows: int, columns: int) -> int:
    """Bytes of a table [rows, columns] in 8 bits: a byte for each value, a float16 scale for each group.

    Raises ValueError where `table_group` is None.
    """
    group = table_group(columns)
    if group is None:
        raise ValueError(f"{columns} columns are not a multiple of {GROUP_SIZES[-1]}")
    padded = -(-rows // TILE_ROWS) * TILE_ROWS
    return padded * (columns + 2 * (columns // group))
