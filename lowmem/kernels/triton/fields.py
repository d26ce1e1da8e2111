"""Where each integer lies in GPTQ's words, as constants of a kernel that is being compiled.

Inputs are counted in units of 32: a unit has `bits` words for each output, in every layout (drawn in
lowmem/checkpoint/packing.py). A kernel takes the integers of a unit out of its words one by one:

    a word of 4-bit integers      | v7 | v6 | v5 | v4 | v3 | v2 | v1 | v0 |
                                  31   27   23   19   15   11    7    3   0

    v0 to v4, in place                        word & (15 << 4 i)         =  v << 4 i
    v5 to v7, from the word 20 bits lower     (word >> 20) & (15 << ..)  =  v << 4 (i - 5)

**An integer below 2^23 is a float.** Its bits, read as a float32, are the subnormal number v 2^place 2^-149,
and cards multiply subnormal numbers at full speed. So one logical operation makes a factor of an integer that
lies anywhere in bits 0 to 22 of a word. Its activation is multiplied by 2^(80 - place), once for all outputs.
The product is v x 2^-69: exact, and an ordinary number for activations of 2^-33 to 2^48.

The constexpr functions are called while Triton compiles; tests call them as plain Python.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def planes_of(bits, planar):
    """The widths of the planes, low bits first; one for a stream of bits."""
    planes = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
    return planes[bits] if planar else (bits,)


@triton.constexpr_function
def pieces_of(bits, planar, value):
    """The pieces of a unit's integer: (word, first bit in the word, first bit in the integer, width)."""
    found = []
    first_word, low = 0, 0
    for width in planes_of(bits, planar):
        word, shift = divmod(value * width, 32)
        here = min(width, 32 - shift)
        found.append((first_word + word, shift, low, here))
        if here < width:  # the other bits are in the next word
            found.append((first_word + word + 1, 0, low + here, width - here))
        first_word += width
        low += width
    return found


@triton.constexpr_function
def count_of_pieces(bits, planar, value):
    """How many pieces an integer has."""
    return len(pieces_of(bits, planar, value))


@triton.constexpr_function
def place_of(bits, planar, value):
    """The bit where the integer begins when it has been taken out, so that it ends below bit 23.

    Integers stay where they are if they can. The others of a word move by the same distance.
    """
    pieces = pieces_of(bits, planar, value)
    _, shift, _, width = pieces[0]
    if len(pieces) > 1 and not planar:
        return 0
    if shift + bits <= 23:
        return shift
    moved = (23 - bits) // width * width + width  # the first integer that does not fit in place
    return shift - moved


@triton.constexpr_function
def word_of(bits, planar, value, piece):
    """The number of the word that holds a piece."""
    return pieces_of(bits, planar, value)[piece][0]


@triton.constexpr_function
def left_of(bits, planar, value, piece):
    """By how many bits a word is shifted to the left to bring a piece to its place; negative: right."""
    _, shift, low, _ = pieces_of(bits, planar, value)[piece]
    return place_of(bits, planar, value) + low - shift


@triton.constexpr_function
def mask_of(bits, planar, value, piece):
    """The bits of a piece, in its place."""
    _, _, low, width = pieces_of(bits, planar, value)[piece]
    return ((1 << width) - 1) << (place_of(bits, planar, value) + low)


@triton.constexpr_function
def ones_of(bits):
    """A word with 1 in each field."""
    return sum(1 << shift for shift in range(0, 32, bits))


@triton.jit
def _moved(word, LEFT: tl.constexpr):
    if LEFT > 0:
        word = word << LEFT
    if LEFT < 0:
        word = word >> -LEFT
    return word


@triton.jit
def field(words, BITS: tl.constexpr, PLANAR: tl.constexpr, VALUE: tl.constexpr):
    """Integer VALUE of a unit, shifted left by place_of, from the unit's words (uint32, a tuple)."""
    found = _moved(words[word_of(BITS, PLANAR, VALUE, 0)], left_of(BITS, PLANAR, VALUE, 0))
    found = found & mask_of(BITS, PLANAR, VALUE, 0)
    for piece in tl.static_range(1, count_of_pieces(BITS, PLANAR, VALUE)):
        more = _moved(words[word_of(BITS, PLANAR, VALUE, piece)], left_of(BITS, PLANAR, VALUE, piece))
        found = found | (more & mask_of(BITS, PLANAR, VALUE, piece))
    return found


@triton.jit
def zero_points(
    zeros_ptr, group, n, N, inside, BITS: tl.constexpr, PLANAR: tl.constexpr, LESS_ONE: tl.constexpr
):
    """The zero-points of groups and outputs, float32, in the shape of group + n.

    zeros_ptr: qzeros, int32 [groups, N * BITS / 32]. inside: what may be read. LESS_ONE: they are stored less
    one; where a field overflows, so does this addition, as in GPTQModel.
    """
    row = group * (N // 32 * BITS + N % 32 * BITS // 32)
    if PLANAR:
        found = _plane(zeros_ptr + row, n, inside, BITS, planes_of(BITS, True)[0], 0)
        if len(planes_of(BITS, True)) > 1:
            low: tl.constexpr = planes_of(BITS, True)[0]
            found = found | _plane(zeros_ptr + row, n, inside, BITS, planes_of(BITS, True)[1], low) << low
        if len(planes_of(BITS, True)) > 2:
            found = found | _plane(zeros_ptr + row, n, inside, BITS, 1, 6) << 6
    else:
        bit = n * BITS
        word = tl.load(zeros_ptr + row + bit // 32, mask=inside, other=0).to(tl.uint32, bitcast=True)
        if 32 % BITS == 0:
            if LESS_ONE:
                word += ones_of(BITS)
            found = (word >> (bit % 32).to(tl.uint32)) & (2**BITS - 1)
        else:  # 3 bits, which may go on in the next word
            straddles = inside & (bit % 32 > 32 - BITS)
            more = tl.load(zeros_ptr + row + bit // 32 + 1, mask=straddles, other=0)
            both = word.to(tl.uint64) | more.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
            found = ((both >> (bit % 32).to(tl.uint64)).to(tl.uint32) + LESS_ONE) & (2**BITS - 1)
    return found.to(tl.float32)


@triton.jit
def _plane(row_ptr, n, inside, BITS: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr):
    """The bits of zero-points in the plane that begins at word FIRST of each unit and has fields of WIDTH."""
    bit = n % 32 * WIDTH
    word = tl.load(row_ptr + n // 32 * BITS + FIRST + bit // 32, mask=inside, other=0)
    return (word.to(tl.uint32, bitcast=True) >> (bit % 32).to(tl.uint32)) & (2**WIDTH - 1)
