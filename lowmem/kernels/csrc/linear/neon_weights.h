/* Weights as the NEON kernels unpack them: a unit's steps, each four inputs of each of four outputs, as bytes. neon_digits.c
 * brings the activations into the same order. */
#ifndef LOWMEM_NEON_WEIGHTS_H
#define LOWMEM_NEON_WEIGHTS_H

#include "blocks.h"
#include "neon.h"

/* Row `row` of a unit's words, of four outputs. */
INLINE uint8x16_t load_row(const uint32_t *words, int64_t stride, int row)
{
    return vreinterpretq_u8_u32(vld1q_u32(words + row * stride));
}

#define AS_16 vreinterpretq_u16_u8
#define AS_32 vreinterpretq_u32_u8
#define FROM_16 vreinterpretq_u8_u16
#define FROM_32 vreinterpretq_u8_u32

/* Where the mask has ones, `a`; else `b`. clang makes three instructions of vbslq_u8. */
INLINE uint8x16_t select(uint32_t mask, uint8x16_t a, uint8x16_t b)
{
    __asm__("bit %0.16b, %1.16b, %2.16b" : "+w"(b) : "w"(a), "w"(vdupq_n_u32(mask)));
    return b;
}

/* Piece `piece` of a unit of 3 bits: eight fields in the lowest 24 bits of each word, others above them. */
INLINE uint8x16_t piece_of_3(int piece, const uint32_t *words, int64_t stride)
{
    const uint32x4_t row = AS_32(load_row(words, stride, piece < 2 ? 0 : piece - 1));
    if (piece == 0)
        return FROM_32(row);
    if (piece == 3)
        return FROM_32(vshrq_n_u32(row, 8));
    const uint32x4_t next = AS_32(load_row(words, stride, piece));
    return FROM_32(piece == 1 ? vsliq_n_u32(vshrq_n_u32(row, 24), next, 8) : vsliq_n_u32(vshrq_n_u32(row, 16), next, 16));
}

INLINE void unpack_stream(const uint32_t *words, int64_t stride, uint8x16_t step[STEPS])
{
    const uint8x16_t field = vdupq_n_u8(7);
    UNROLL
    for (int piece = 0; piece < 4; piece++) {
        /* 24 bits to two times 12, then to four times 6: two fields in each byte. */
        uint8x16_t v = piece_of_3(piece, words, stride);
        v = select(0xffff0000, FROM_32(vshlq_n_u32(AS_32(v), 4)), v);
        v = select(0xff00ff00, FROM_16(vshlq_n_u16(AS_16(v), 2)), v);
        step[2 * piece] = vandq_u8(v, field);
        step[2 * piece + 1] = vandq_u8(vshrq_n_u8(v, 3), field);
        HOLD(step[2 * piece + 1]);
    }
}

/* Set bits `to` and up of v to the field of `bits` bits (2 or 1) that begins at bit `from` of `plane`; the bits above it are
 * undefined. */
INLINE uint8x16_t with_field(uint8x16_t v, uint8x16_t plane, int from, int to)
{
    const uint32_t upper = (uint32_t)(0xff << to & 0xff) * 0x01010101;
    if (from == 0)
        return to == 4 ? vsliq_n_u8(v, plane, 4) : vsliq_n_u8(v, plane, 6);
    return select(upper, from < to ? plane << (to - from) : plane >> (from - to), v);
}

/* 5 to 7 bits. The four rows of the plane of 4 bits are transposed, so that a word has one byte of each: two inputs of each
 * byte. The other planes' bytes are brought into the same order. */
INLINE void unpack_planes(int bits, const uint32_t *words, int64_t stride, uint8x16_t step[STEPS])
{
    const uint8x16_t row[4] = {load_row(words, stride, 0), load_row(words, stride, 1), load_row(words, stride, 2),
                               load_row(words, stride, 3)};
    const uint16x8_t even[2] = {AS_16(vtrn1q_u8(row[0], row[2])), AS_16(vtrn1q_u8(row[1], row[3]))};
    const uint16x8_t odd[2] = {AS_16(vtrn2q_u8(row[0], row[2])), AS_16(vtrn2q_u8(row[1], row[3]))};
    const uint8x16_t low[4] = {FROM_16(vtrn1q_u16(even[0], even[1])), FROM_16(vtrn1q_u16(odd[0], odd[1])),
                               FROM_16(vtrn2q_u16(even[0], even[1])), FROM_16(vtrn2q_u16(odd[0], odd[1]))};
    uint8x16_t twos[2] = {low[0], low[0]}, ones = low[0];
    if (bits >= 6) {
        const uint8x16_t first = load_row(words, stride, 4), second = load_row(words, stride, 5);
        twos[0] = vtrn1q_u8(first, second);
        twos[1] = vtrn2q_u8(first, second);
    }
    if (bits % 2) { /* inputs 0..7, 8..15 and so on: the middle two change places */
        const uint8x16_t order = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
        ones = vqtbl1q_u8(load_row(words, stride, bits - 1), order);
    }
    UNROLL
    for (int s = 0; s < STEPS; s++) {
        uint8x16_t v = s % 2 ? vshrq_n_u8(low[s / 2], 4) : low[s / 2];
        if (bits >= 6)
            v = with_field(v, s % 2 ? vshrq_n_u8(twos[s / 4], 2) : twos[s / 4], s % 4 / 2 * 4, 4);
        if (bits % 2)
            v = with_field(v, ones, s, bits - 1);
        step[s] = vandq_u8(v, vdupq_n_u8((uint8_t)((1 << bits) - 1)));
        HOLD(step[s]);
    }
}

/* The steps of a unit of four outputs, whose rows of words are `stride` apart. */
INLINE void unpack(int bits, const uint32_t *words, int64_t stride, uint8x16_t step[STEPS])
{
    if (bits == 8) {
        UNROLL
        for (int i = 0; i < 8; i++)
            step[i] = load_row(words, stride, i);
    } else if (bits == 4) {
        UNROLL
        for (int i = 0; i < 4; i++) {
            const uint8x16_t v = load_row(words, stride, i);
            step[2 * i] = vandq_u8(v, vdupq_n_u8(15));
            step[2 * i + 1] = vshrq_n_u8(v, 4);
        }
    } else if (bits == 2) {
        const uint8x16_t field = vdupq_n_u8(3);
        UNROLL
        for (int i = 0; i < 2; i++) {
            const uint8x16_t v = load_row(words, stride, i);
            step[4 * i] = vandq_u8(v, field);
            step[4 * i + 1] = vandq_u8(vshrq_n_u8(v, 2), field);
            step[4 * i + 2] = vandq_u8(vshrq_n_u8(v, 4), field);
            step[4 * i + 3] = vshrq_n_u8(v, 6);
        }
    } else if (bits == 3) {
        unpack_stream(words, stride, step);
    } else {
        unpack_planes(bits, words, stride, step);
    }
}

/* As signed bytes: those that need all 8 bits are 128 less, which the sums make up for. */
INLINE int8x16_t as_signed(int bits, uint8x16_t v)
{
    return vreinterpretq_s8_u8(bits == 8 ? veorq_u8(v, vdupq_n_u8(128)) : v);
}

/* A unit's weights as signed bytes: its steps and, for LM_PAIRED, pairs of two steps in a byte, by which shared digits are
 * multiplied. GPTQ's words of 4 bits consist of them. */
INLINE void unpack_signed(int bits, int planes, const uint32_t *words, int64_t stride, int8x16_t step[STEPS],
                          int8x16_t pair[PAIR_STEPS])
{
    uint8x16_t v[STEPS];
    unpack(bits, words, stride, v);
    UNROLL
    for (int i = 0; i < STEPS; i++)
        step[i] = as_signed(bits, v[i]);
    UNROLL
    for (int i = 0; i < PAIR_STEPS; i++)
        if (planes != LM_PAIRED)
            pair[i] = step[0]; /* not used */
        else if (bits == 4)
            pair[i] = as_signed(8, load_row(words, stride, i));
        else
            pair[i] = as_signed(bits + 4, vsliq_n_u8(v[2 * i], v[2 * i + 1], 4));
}

#endif
