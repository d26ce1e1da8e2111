"""Pack integers into GPTQ's words and unpack them: pure functions, exact for 8, 4, 3 and 2 bits.

Along the packed axis the values are one little-endian bit stream, 32 values in `bits` words of 32
bits. `qweight` is packed along the input axis (rows), `qzeros` along the output axis (columns). The
words, highest bit first, with the number of the value that each bit belongs to:

    8 bits   word 0   33333333 22222222 11111111 00000000
    4 bits   word 0   7777 6666 5555 4444 3333 2222 1111 0000
    2 bits   word 0   ff ee dd cc bb aa 99 88 77 66 55 44 33 22 11 00              (hex digits)
    3 bits   word 0   10 10 | 9 9 9 | 8 8 8 | … | 1 1 1 | 0 0 0         low 2 bits of value 10
             word 1   21 | 20 20 20 | … | 12 12 12 | 11 11 11 | 10      low bit of 21, high bit of 10
             word 2   31 31 31 | … | 23 23 23 | 22 22 22 | 21 21        high 2 bits of value 21

auto-gptq, GPTQModel, exllama and vLLM read and write this layout.

**Zero-points.** Format `gptq` (v1) stores zero - 1, `gptq_v2` stores the zero-point. All readers agree on
zero-points of 1..2^bits - 1. They disagree on a stored 2^bits - 1 in v1: auto-gptq 0.7.1 adds 1 to each field
and masks, and so reads 0; GPTQModel 7.7 adds 0x11111111 (4 bits; 0x55555555 at 2, 0x01010101 at 8) to the
whole word, and so reads 0 and *carries 1 into the next higher field*; at 3 bits it adds field by field and
reads 0. GPTQModel writes zero-points of 0 by the corresponding subtraction of words, so only its addition
inverts such a file. `unpack_zeros` does what GPTQModel does; `pack_zeros` refuses the zero-points on which
readers disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowmem.config import BITS

WORD_BITS = 32
_CHUNK_VALUES = 1 << 21
"""Values processed at a time: temporaries stay within a few MiB."""


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


def pack_rows(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integers [in, out] of 0..2^bits-1 into `qweight`, int32 [in * bits / 32, out].

    Raises ValueError when a value does not fit, or `in` does not fill whole words.
    """
    _check_matrix(q)
    if q.dtype.is_floating_point or q.dtype is torch.bool:
        raise ValueError(f"q must have an integer dtype, not {q.dtype}")
    rows, columns = q.shape
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
        for index in range(unit_values):
            word, shift = divmod(index * bits, WORD_BITS)
            value = values[:, index].to(torch.int32)
            chunk[:, word] |= value << shift  # bits above 31 are lost here …
            if shift + bits > WORD_BITS:
                chunk[:, word + 1] |= value >> (WORD_BITS - shift)  # … and stored here
    return words


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack `qweight`, int32 [in * bits / 32, out], into integers, uint8 [in, out].

    Raises ValueError when the tensor is not a matrix of whole words.
    """
    _check_matrix(words)
    if words.dtype is not torch.int32:
        raise ValueError(f"int32 words expected, not {words.dtype}")
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
        for index in range(unit_values):
            word, shift = divmod(index * bits, WORD_BITS)
            # >> is arithmetic, so the mask must not be wider than the bits in this word.
            here = min(bits, WORD_BITS - shift)
            value = (chunk[:, word] >> shift) & ((1 << here) - 1)
            if here < bits:
                value |= (chunk[:, word + 1] << here) & ((1 << bits) - 1)
            grouped_values[start:stop, index] = value
    return values


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack zero-points [groups, out] of 1..2^bits-1 into `qzeros` of format `gptq` (v1).

    The words are int32 [groups, out * bits / 32]. Raises ValueError for 0 and 2^bits: readers
    disagree about them (see the module's docstring).
    """
    _check_matrix(zeros)
    if zeros.numel():
        low, high = (int(edge) for edge in zeros.aminmax())
        if low < 1 or high >= 1 << bits:
            raise ValueError(f"zero-points from {low} to {high}: format gptq holds 1 to {(1 << bits) - 1}")
    return pack_rows((zeros - 1).T, bits).T.contiguous()


def unpack_zeros(words: torch.Tensor, bits: int, *, v2: bool = False) -> torch.Tensor:
    """Unpack `qzeros`, int32 [groups, out * bits / 32], into the true zero-points.

    They are uint8 [groups, out] of 0..2^bits-1. In v1 (v2=False) the stored fields are one less. A stored
    2^bits-1 gives 0, and at 8, 4 and 2 bits adds one to the next field of its word, as in GPTQModel 7.7.
    """
    _check_matrix(words)
    if v2:
        return unpack_rows(words.T, bits).T.contiguous()
    if bits == 3:  # values straddle words: field by field, modulo 8
        return ((unpack_rows(words.T, bits) + 1) & 7).T.contiguous()
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))  # at most 0x55555555: a positive int32
    return unpack_rows((words + ones).T, bits).T.contiguous()


def _middle_words(bits: int, v2: bool) -> torch.Tensor:
    """The words, int32 [1 or 3], that `qzeros` repeats where every zero-point is the middle, 2^(bits - 1)."""
    stored = torch.full((WORD_BITS, 1), (1 << (bits - 1)) - (0 if v2 else 1), dtype=torch.uint8)
    return pack_rows(stored, bits)[: _unit(bits)[1], 0]


def all_middle(qzeros: torch.Tensor, bits: int, *, v2: bool = False) -> bool:
    """Whether every zero-point of `qzeros` is the middle, 2^(bits - 1); compares whole words."""
    words = _middle_words(bits, v2).to(qzeros.device)
    if len(words) == 1 and qzeros.numel():  # three times as fast
        low, high = qzeros.aminmax()
        return bool((low == words[0]) & (high == words[0]))
    return bool((qzeros.reshape(-1, len(words)) == words).all())


def _unit(bits: int) -> tuple[int, int]:
    """The smallest whole number of words: (values, words) in it."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits is not one of {BITS}")
    return (32, 3) if bits == 3 else (WORD_BITS // bits, 1)


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
