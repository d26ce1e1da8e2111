"""Many rows times a packed weight: a tile of it is dequantized and multiplied by the matrix cores.

    words [R, BLOCK_N]  →  integers [R, 32 / BITS, BLOCK_N]  →  weights [32 R / BITS, BLOCK_N]  →  tl.dot

The shifts of the second step differ along an axis that each thread holds whole, so they are constants of the
compiled code. A weight is (integer - zero) * scale in float32, rounded once to the dtype of the activations:
the reference's own values. `dequantize` writes the same tiles to memory, for cuBLAS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowmem.kernels.triton.fields import planes_of, zero_points


@triton.jit
def _words(qweight_ptr, row, n, rows, N):
    inside = (row < rows)[:, None] & (n < N)
    word = tl.load(qweight_ptr + row[:, None] * N + n, mask=inside, other=0)
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def _spread(word, WIDTH: tl.constexpr):
    """The fields of words [rows, BLOCK] as [rows * 32 / WIDTH, BLOCK]."""
    shift = (tl.arange(0, 32 // WIDTH) * WIDTH).to(tl.uint32)
    found = (word[:, None, :] >> shift[None, :, None]) & (2**WIDTH - 1)
    return tl.reshape(found, [word.shape[0] * (32 // WIDTH), word.shape[1]])


@triton.jit
def _plane(
    qweight_ptr, first, n, rows, N,
    BITS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The bits of STEP inputs in the plane that begins at word FIRST of each unit and has fields of WIDTH."""
    number = tl.arange(0, STEP * WIDTH // 32)
    row = (first // 32 + number // WIDTH) * BITS + FIRST + number % WIDTH
    return _spread(_words(qweight_ptr, row, n, rows, N), WIDTH)


@triton.jit
def _integers(qweight_ptr, first, n, K, N, BITS: tl.constexpr, PLANAR: tl.constexpr, STEP: tl.constexpr):
    """The integers of inputs first to first + STEP - 1 for outputs n [1, BLOCK]: uint32 [STEP, BLOCK]."""
    rows = K * BITS // 32
    if PLANAR:
        low: tl.constexpr = planes_of(BITS, True)[0]
        found = _plane(qweight_ptr, first, n, rows, N, BITS, STEP, low, 0)
        if len(planes_of(BITS, True)) > 1:
            next_width: tl.constexpr = planes_of(BITS, True)[1]
            found = found | _plane(qweight_ptr, first, n, rows, N, BITS, STEP, next_width, low) << low
        if len(planes_of(BITS, True)) > 2:
            found = found | _plane(qweight_ptr, first, n, rows, N, BITS, STEP, 1, 6) << 6
        return found
    elif 32 % BITS == 0:
        row = first * BITS // 32 + tl.arange(0, STEP * BITS // 32)
        return _spread(_words(qweight_ptr, row, n, rows, N), BITS)
    else:  # 3 bits: integers 10 and 21 of a unit straddle words
        row = first // 32 * 3 + tl.arange(0, STEP // 32) * 3
        one = _words(qweight_ptr, row, n, rows, N)[:, None, :].to(tl.uint64)
        two = _words(qweight_ptr, row + 1, n, rows, N)[:, None, :].to(tl.uint64)
        three = _words(qweight_ptr, row + 2, n, rows, N)[:, None, :].to(tl.uint64)
        bit = (tl.arange(0, 32) * 3)[None, :, None]
        pair = tl.where(bit < 32, one | two << 32, two | three << 32)
        found = (pair >> (bit - tl.where(bit < 32, 0, 32)).to(tl.uint64)).to(tl.uint32) & 7
        return tl.reshape(found, [STEP, n.shape[1]])


@triton.jit
def _weights(
    qweight_ptr, qzeros_ptr, scales_ptr, first, n, K, N,
    BITS: tl.constexpr, PLANAR: tl.constexpr, LESS_ONE: tl.constexpr, MIDDLE: tl.constexpr,
    GROUP: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The weights of inputs first to first + STEP - 1 for outputs n [1, BLOCK]: float32 [STEP, BLOCK]."""
    integers = _integers(qweight_ptr, first, n, K, N, BITS, PLANAR, STEP)
    # An integer below 2^23 or'ed into 2^23 is their sum.
    values = (integers | 0x4B000000).to(tl.float32, bitcast=True)
    if GROUP % STEP == 0:  # one group
        group = (tl.zeros([1], tl.int32) + first // GROUP)[:, None]
    else:
        group = ((first + tl.arange(0, STEP)) // GROUP)[:, None]
    inside = (group <= (K - 1) // GROUP) & (n < N)
    scale = tl.load(scales_ptr + group * N + n, mask=inside, other=0).to(tl.float32)
    if MIDDLE:
        return (values - (2.0**23 + 2.0 ** (BITS - 1))) * scale
    else:
        zero = zero_points(qzeros_ptr, group, n, N, inside, BITS, PLANAR, LESS_ONE)
        return (values - (zero + 2.0**23)) * scale


@triton.jit(do_not_specialize=["M"])  # compiled once for all numbers of rows
def many_rows(
    x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, bias_ptr, y_ptr, M, K, N,
    BITS: tl.constexpr, PLANAR: tl.constexpr, LESS_ONE: tl.constexpr, MIDDLE: tl.constexpr,
    GROUP: tl.constexpr, BIAS: tl.constexpr, FACTORS: tl.constexpr,
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] in 16 bits times the weight, plus the bias.

    FACTORS: "float32" where the matrix product has no 16-bit floats, as in Triton's interpreter; the products
    are the same. STEP: inputs a step. Grid: (blocks of outputs, blocks of rows).
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    k = tl.arange(0, STEP)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, STEP):
        inside = (m < M)[:, None] & (first + k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + (first + k)[None, :], mask=inside, other=0)
        weights = _weights(
            qweight_ptr, qzeros_ptr, scales_ptr, first, n, K, N,
            BITS, PLANAR, LESS_ONE, MIDDLE, GROUP, STEP,
        ).to(x.dtype)  # fmt: skip
        if FACTORS == "float32":
            total = tl.dot(x.to(tl.float32), weights.to(tl.float32), total)
        else:
            total = tl.dot(x, weights, total)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)
    tl.store(y_ptr + m[:, None] * N + n, total.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N))


@triton.jit
def dequantize(
    qweight_ptr, qzeros_ptr, scales_ptr, out_ptr, K, N, start, columns,
    BITS: tl.constexpr, PLANAR: tl.constexpr, LESS_ONE: tl.constexpr, MIDDLE: tl.constexpr,
    GROUP: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write outputs start to start + columns - 1 of the weight to out [K, columns].

    Grid: (blocks of inputs, blocks of outputs).
    """
    k = (tl.program_id(0) * STEP + tl.arange(0, STEP))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (k < K) & (column < columns)
    weights = _weights(
        qweight_ptr, qzeros_ptr, scales_ptr, tl.program_id(0) * STEP, start + column, K, N,
        BITS, PLANAR, LESS_ONE, MIDDLE, GROUP, STEP,
    ).to(out_ptr.dtype.element_ty)  # fmt: skip
    tl.store(out_ptr + k * columns + column, weights, mask=inside)
