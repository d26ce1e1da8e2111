"""Pack integers into GPTQ's words and unpack them: pure functions, exact for 8 to 2 bits.

`qweight` is packed along the input axis (rows), `qzeros` along the output axis (columns). In the layouts
`gptq` and `gptq_v2` the values along that axis are one little-endian bit stream, 32 values in `bits` words of
32 bits. The words, highest bit first, with the number of the value that each bit belongs to:

    8 bits   word 0   33333333 22222222 11111111 00000000
    4 bits   word 0   7777 6666 5555 4444 3333 2222 1111 0000
    2 bits   word 0   ff ee dd cc bb aa 99 88 77 66 55 44 33 22 11 00              (hex digits)
    3 bits   word 0   10 10 | 9 9 9 | 8 8 8 | … | 1 1 1 | 0 0 0         low 2 bits of value 10
             word 1   21 | 20 20 20 | … | 12 12 12 | 11 11 11 | 10      low bit of 21, high bit of 10
             word 2   31 31 31 | … | 23 23 23 | 22 22 22 | 21 21        high 2 bits of value 21

auto-gptq, GPTQModel, exllama and vLLM read and write them.

In `gptq_p`, which GPTQModel reads and writes, no value straddles words: the bits of 32 values are split into
planes, which are packed one after another like values of 4, 2 or 1 bits. The planes, low bits first:

    8 = 8    7 = 4 + 2 + 1    6 = 4 + 2    5 = 4 + 1    4 = 4    3 = 2 + 1    2 = 2

    5 bits   words 0 to 3   bits 0 to 3 of the 32 values, as values of 4 bits
             word 4         bit 4 of value 31 | … | 1 | 0

So 8, 4 and 2 bits have the same words in every layout; 3 bits have not.

**Zero-points.** `gptq` (v1) stores zero - 1, `gptq_v2` and `gptq_p` store the zero-point. All readers agree
on zero-points of 1..2^bits - 1. They disagree on a stored 2^bits - 1 in v1: auto-gptq 0.7.1 adds 1 to each
field and masks, and so reads 0; GPTQModel 7.7 adds 0x11111111 (4 bits; 0x55555555 at 2, 0x01010101 at 8) to
the whole word, and so reads 0 and *carries 1 into the next higher field*; at 3 bits it adds field by field
and reads 0. GPTQModel writes zero-points of 0 by the corresponding subtraction of words, so only its
addition inverts such a file. `unpack_zeros` does what GPTQModel does; `pack_zeros` refuses the zero-points
on which readers disagree.

Every function takes the layout by its name, a key of formats.LAYOUTS; None is the one that lowmem writes for
the width, `gptq_p` for 7, 6 and 5 bits and `gptq` for the others. It raises ValueError for a width that the
layout does not store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from lowmem.checkpoint.formats import LAYOUTS, Layout, layout_for
from lowmem.config import BITS

WORD_BITS = 32
_CHUNK_VALUES = 1 << 21
"""Values processed at a time: temporaries stay within a few MiB."""
_PLANES = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
"""The widths of the planes in a planar layout, low bits first, by the width of the values."""


@dataclass(frozen=True)
class StoredShapes:
    """The shapes of a quantized linear's tensors (the bias is [out])."""

    qweight: tuple[int, int]  # [in * bits / 32, out]
    qzeros: tuple[int, int]  # [groups, out * bits / 32]
    scales: tuple[int, int]  # [groups, out]
    g_idx: tuple[int]  # [in]

    @property
    def groups(self) -> int:
        """Number of groups of input columns."""
        return self.scales[0]


def stored_shapes(in_features: int, out_features: int, bits: int, group_size: int) -> StoredShapes:
    """The shapes of a linear's tensors on disk; group_size -1 is one group.

    Raises ValueError for an unknown width, a group size that is not positive, or features that do not fill
    whole words.
    """
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size {group_size} is neither -1 nor positive")
    groups = 1 if group_size == -1 else -(-in_features // group_size)
    return StoredShapes(
        qweight=(_words(in_features, bits), out_features),
        qzeros=(groups, _words(out_features, bits)),
        scales=(groups, out_features),
        g_idx=(in_features,),
    )


def pack_rows(q: torch.Tensor, bits: int, layout: str | None = None) -> torch.Tensor:
    """Pack integers [in, out] of 0..2^bits-1 into `qweight`, int32 [in * bits / 32, out].

    Raises ValueError when a value does not fit, or `in` does not fill whole words.
    """
    _check_matrix(q)
    if q.dtype.is_floating_point or q.dtype is torch.bool:
        raise ValueError(f"q must have an integer dtype, not {q.dtype}")
    rows, columns = q.shape
    fields = _fields(bits, _layout(bits, layout).planar)
    words = torch.empty((_words(rows, bits), columns), dtype=torch.int32, device=q.device)
    if q.numel() == 0:
        return words
    unit_values, unit_words = _unit(bits)
    grouped_words = words.view(-1, unit_words, columns)
    grouped_values = q.reshape(-1, unit_values, columns)
    for start, stop in _chunks(len(grouped_words), unit_values * columns):
        values = grouped_values[start:stop]
        low, high = (int(edge) for edge in values.aminmax())
        if low < 0 or high >= 1 << bits:
            raise ValueError(f"values from {low} to {high} do not fit {bits} bits")
        chunk = grouped_words[start:stop].zero_()
        for field in fields:
            part = values[:, field.value].to(torch.int32)
            if field.width < bits:
                part = (part >> field.low) & field.mask
            chunk[:, field.word] |= part << field.shift
    return words


def unpack_rows(words: torch.Tensor, bits: int, layout: str | None = None) -> torch.Tensor:
    """Unpack `qweight`, int32 [in * bits / 32, out], into integers, uint8 [in, out].

    Raises ValueError when the tensor is not a matrix of whole words.
    """
    _check_matrix(words)
    if words.dtype is not torch.int32:
        raise ValueError(f"int32 words expected, not {words.dtype}")
    fields = _fields(bits, _layout(bits, layout).planar)
    unit_values, unit_words = _unit(bits)
    rows, columns = words.shape
    if rows % unit_words:
        raise ValueError(f"{rows} rows of words do not hold a whole number of {bits}-bit values")
    values = torch.empty((rows // unit_words * unit_values, columns), dtype=torch.uint8, device=words.device)
    if values.numel() == 0:
        return values
    grouped_words = words.reshape(-1, unit_words, columns)
    grouped_values = values.view(-1, unit_values, columns)
    for start, stop in _chunks(len(grouped_words), unit_values * columns):
        chunk = grouped_words[start:stop]
        for field in fields:
            # >> is arithmetic: the mask removes the copies of the sign.
            part = (chunk[:, field.word] >> field.shift) & field.mask
            if field.low == 0:
                grouped_values[start:stop, field.value] = part
            else:
                grouped_values[start:stop, field.value] |= part << field.low
    return values


def rows_in_order(qweight: torch.Tensor, bits: int, layout: str, order: torch.Tensor) -> torch.Tensor:
    """A copy of `qweight` [in * bits / 32, out] with its inputs in another order (position → input)."""
    result = torch.empty_like(qweight)
    step = max(32, _CHUNK_VALUES // max(1, order.numel()))
    for start in range(0, qweight.shape[1], step):
        columns = slice(start, start + step)
        values = unpack_rows(qweight[:, columns], bits, layout)[order]
        result[:, columns] = pack_rows(values, bits, layout)
    return result


def pack_zeros(zeros: torch.Tensor, bits: int, layout: str | None = None) -> torch.Tensor:
    """Pack zero-points [groups, out] into `qzeros`, int32 [groups, out * bits / 32].

    Raises ValueError for a zero-point that does not fit, and in `gptq` (v1) for 0, on which readers disagree
    (see the module's docstring).
    """
    _check_matrix(zeros)
    found = _layout(bits, layout)
    least = 0 if found.zeros_v2 else 1
    if zeros.numel():
        low, high = (int(edge) for edge in zeros.aminmax())
        if low < least or high >= 1 << bits:
            most = (1 << bits) - 1
            raise ValueError(f"zero-points from {low} to {high}: {found.name} holds {least} to {most}")
    return pack_rows((zeros - least).T, bits, found.name).T.contiguous()


def unpack_zeros(words: torch.Tensor, bits: int, layout: str | None = None) -> torch.Tensor:
    """Unpack `qzeros`, int32 [groups, out * bits / 32], into the true zero-points.

    They are uint8 [groups, out] of 0..2^bits-1. In v1 the stored fields are one less. A stored
    2^bits-1 gives 0, and at 8, 4 and 2 bits adds one to the next field of its word, as in GPTQModel 7.7.
    """
    _check_matrix(words)
    found = _layout(bits, layout)
    if found.zeros_v2:
        return unpack_rows(words.T, bits, found.name).T.contiguous()
    if bits == 3:  # values straddle words: field by field, modulo 8
        return ((unpack_rows(words.T, bits, found.name) + 1) & 7).T.contiguous()
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))  # at most 0x55555555: a positive int32
    return unpack_rows((words + ones).T, bits, found.name).T.contiguous()


def _middle_words(bits: int, layout: str | None) -> torch.Tensor:
    """The words, int32 [1 or bits], that `qzeros` repeats where every zero-point is the middle."""
    zeros = torch.full((1, WORD_BITS), 1 << (bits - 1), dtype=torch.uint8)
    return pack_zeros(zeros, bits, layout)[0, : _unit(bits)[1]]


def all_middle(qzeros: torch.Tensor, bits: int, layout: str | None = None) -> bool:
    """Whether every zero-point of `qzeros` is the middle, 2^(bits - 1); compares whole words."""
    words = _middle_words(bits, layout).to(qzeros.device)
    if len(words) == 1 and qzeros.numel():  # three times as fast
        low, high = qzeros.aminmax()
        return bool((low == words[0]) & (high == words[0]))
    return bool((qzeros.reshape(-1, len(words)) == words).all())


@dataclass(frozen=True)
class _Field:
    """Bits of a value that lie side by side in a word. Values and words are counted inside a unit."""

    value: int
    low: int
    """The first bit of the value."""
    word: int
    shift: int
    """The first bit of the word."""
    width: int

    @property
    def mask(self) -> int:
        return (1 << self.width) - 1


@cache
def _fields(bits: int, planar: bool) -> tuple[_Field, ...]:
    """All fields of a unit; those of one value from low bits to high ones."""
    found = []
    first_word = low = 0
    for width in _PLANES[bits] if planar else (bits,):
        for value in range(_unit(bits)[0]):
            word, shift = divmod(value * width, WORD_BITS)
            here = min(width, WORD_BITS - shift)
            found.append(_Field(value, low, first_word + word, shift, here))
            if here < width:
                found.append(_Field(value, low + here, first_word + word + 1, 0, width - here))
        first_word += width
        low += width
    return tuple(found)


def _layout(bits: int, layout: str | None) -> Layout:
    """The layout of that name. Raises ValueError if it does not store the width."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits is not one of {BITS}")
    found = LAYOUTS[layout or layout_for((bits,))]
    if bits not in found.bits:
        raise ValueError(f"{found.name} does not store {bits} bits")
    return found


def _unit(bits: int) -> tuple[int, int]:
    """The smallest whole number of words: (values, words) in it."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits is not one of {BITS}")
    return (WORD_BITS, bits) if WORD_BITS % bits else (WORD_BITS // bits, 1)


def _words(features: int, bits: int) -> int:
    values, words = _unit(bits)
    if features < 0 or features % values:
        raise ValueError(f"{features} features do not fill whole words of {values} {bits}-bit values")
    return features // values * words


def _chunks(units: int, values_in_unit: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_VALUES // max(1, values_in_unit))
    for start in range(0, units, step):
        yield start, min(start + step, units)


def _check_matrix(tensor: torch.Tensor) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"a matrix expected, not shape {tuple(tensor.shape)}")
