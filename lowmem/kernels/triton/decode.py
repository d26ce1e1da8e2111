"""One to four rows times a packed weight: each word is read once and multiplied on the card's plain cores.

A program has BLOCK outputs and steps through the inputs, UNITS units of 32 at a time, which its warps share.
For each unit and output it adds up x v over the 32 inputs and x alone, and once a group it turns both into

    scale (sum x v - zero sum x)

so the inner loop is, for each weight, one logical operation (fields.py says why no more), one multiplication
with addition, and a share of the shifts. Sums are float32. A row's bits depend neither on the other rows nor
on how many there are: every sum has one order, given by the shape, UNITS and the number of parts.

In several parts, the inputs are divided among several programs, each of which writes its sums; `add_parts`
adds them up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowmem.kernels.triton.fields import field, place_of, zero_points


@triton.constexpr_function
def factor_of(bits, planar, value):
    """What an activation is multiplied by to go with its integer: 2^(80 - place)."""
    return 2.0 ** (80 - place_of(bits, planar, value))


@triton.jit
def _activations(x_ptr, unit, inside, count, FLOAT: tl.constexpr, WHOLE: tl.constexpr):
    """A row's activations of units, as a tuple: 32 of float32, or 8 times four in 64 bits; `count` in all."""
    found = ()
    for part in tl.static_range(32 if FLOAT == "float32" else 8):
        place = unit * (32 if FLOAT == "float32" else 8) + part
        if WHOLE:
            read = tl.load(x_ptr + place)
        else:
            read = tl.load(x_ptr + place, mask=inside & (place < count), other=0)
        found = found + (read,)
    return found


@triton.jit
def _activation(read, VALUE: tl.constexpr, FLOAT: tl.constexpr):
    """Activation VALUE of 32 that `_activations` has read, as float32."""
    if FLOAT == "float32":
        return read[VALUE]
    else:
        pair = (read[VALUE // 4] >> (32 if VALUE % 4 > 1 else 0)).to(tl.uint32)
        if FLOAT == "bfloat16":
            pair = pair & 0xFFFF0000 if VALUE % 2 else pair << 16
            return pair.to(tl.float32, bitcast=True)
        else:
            half = (pair >> (16 if VALUE % 2 else 0)).to(tl.uint16)
            return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.constexpr_function
def halvings(units):
    """How often a power of two can be halved."""
    return units.bit_length() - 1


@triton.jit
def _sum_of_units(totals, BLOCK: tl.constexpr):
    """[units, BLOCK] → [BLOCK], two halves at a time: one order, in whichever threads the units are."""
    for _ in tl.static_range(halvings(totals.shape[0])):
        totals = tl.sum(tl.reshape(totals, [2, totals.shape[0] // 2, BLOCK]), axis=0)
    return tl.reshape(totals, [BLOCK])


@triton.jit
def few_rows(
    x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, y_ptr, K, N, per_part,
    BITS: tl.constexpr, PLANAR: tl.constexpr, LESS_ONE: tl.constexpr, MIDDLE: tl.constexpr,
    GROUP: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, FLOAT: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
    UNITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [ROWS, N] = x [ROWS, K] times the weight, plus the bias; SPLIT: sums [parts, ROWS, N] in float32.

    x_ptr: float32, or 16-bit floats read as int64. per_part: units of a program, a multiple of UNITS.
    MIDDLE: all zero-points are the middle. GROUP: inputs that share a scale; SHARED: of a unit, those that
    surely do, gcd(GROUP, 32). WHOLE: K is a multiple of 32 * per_part and N of BLOCK. Grid: (blocks, parts).
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(1) * per_part
    units = (K + 31) // 32
    reads_a_row = K if FLOAT == "float32" else K // 4
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros([UNITS, BLOCK], tl.float32),)
    for start in range(first, min(first + per_part, units), UNITS):
        unit = start + tl.arange(0, UNITS)
        inside = unit < units
        words = ()
        for number in tl.static_range(BITS):
            row = unit[:, None] * BITS + number
            if WHOLE:
                word = tl.load(qweight_ptr + row * N + n)
            else:
                word = tl.load(qweight_ptr + row * N + n, mask=(row < K * BITS // 32) & (n < N), other=0)
            words = words + (word.to(tl.uint32, bitcast=True),)
        reads = ()
        for row in tl.static_range(ROWS):
            reads = reads + (
                _activations(x_ptr + row * reads_a_row, unit, inside, reads_a_row, FLOAT, WHOLE),
            )
        for shared in tl.static_range(32 // SHARED):
            sums = ()
            plain = ()
            for _ in tl.static_range(ROWS):
                sums = sums + (tl.zeros([UNITS, BLOCK], tl.float32),)
                plain = plain + (tl.zeros([UNITS], tl.float32),)
            for number in tl.static_range(shared * SHARED, shared * SHARED + SHARED):
                weight = field(words, BITS, PLANAR, number).to(tl.float32, bitcast=True)
                new_sums = ()
                new_plain = ()
                for row in tl.static_range(ROWS):
                    x = _activation(reads[row], number, FLOAT)
                    scaled = x * factor_of(BITS, PLANAR, number)
                    new_sums = new_sums + (tl.fma(scaled[:, None], weight, sums[row]),)
                    new_plain = new_plain + (plain[row] + x,)
                sums = new_sums
                plain = new_plain
            group = ((unit * 32 + shared * SHARED) // GROUP)[:, None]
            there = (inside & (unit * 32 + shared * SHARED < K))[:, None] & (n < N)
            if WHOLE:
                scale = tl.load(scales_ptr + group * N + n).to(tl.float32)
            else:
                scale = tl.load(scales_ptr + group * N + n, mask=there, other=0).to(tl.float32)
            new_totals = ()
            for row in tl.static_range(ROWS):
                small = plain[row] * 2.0**-69  # as small as the sums with integers
                if MIDDLE:
                    value = sums[row] - (small * 2.0 ** (BITS - 1))[:, None]
                else:
                    zero = zero_points(qzeros_ptr, group, n, N, there, BITS, PLANAR, LESS_ONE)
                    value = tl.fma(-zero, small[:, None], sums[row])
                new_totals = new_totals + (tl.fma(scale, value, totals[row]),)
            totals = new_totals
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for row in tl.static_range(ROWS):
        y = _sum_of_units(totals[row], BLOCK) * 2.0**69
        if BIAS and not SPLIT:
            y += tl.load(bias_ptr + columns, mask=columns < N, other=0).to(tl.float32)
        place = (tl.program_id(1) * ROWS + row) * N + columns
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=columns < N)


@triton.jit(do_not_specialize=["values"])
def add_parts(
    parts_ptr, bias_ptr, y_ptr, values, N, PARTS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """y [rows, N] = the sum of parts float32 [PARTS, rows, N], in order, plus the bias. values: rows * N."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < values
    y = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(parts_ptr + part * values + place, mask=inside, other=0)
    if BIAS:
        y += tl.load(bias_ptr + place % N, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)
