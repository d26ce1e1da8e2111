/* Weights as the kernels with AVX-512 take them apart: VNNI for products of bytes, VBMI2 and GFNI for fields of 3 and 2 bits
 * (Ice Lake, Zen 4 and later).
 *
 * A step is four inputs of each of 16 outputs, as GPTQ's words come apart; digits_avx512.c brings activations into its order.
 */
#ifndef LOWMEM_WEIGHTS_AVX512_H
#define LOWMEM_WEIGHTS_AVX512_H

#include <string.h>

#include "avx512.h"
#include "types.h"

enum { FULL = 0xffff };

INLINE __m512i load_words(const uint32_t *words, __mmask16 mask)
{
    return mask == FULL ? _mm512_loadu_si512(words) : _mm512_maskz_loadu_epi32(mask, words);
}

/* Rows of words that come apart together, and the pieces, of so many steps each, in which they are taken apart: a piece at
 * a time leaves the registers to the sums. */
#define UNIT_ROWS(bits) ((bits) == 3 ? 3 : 1)
#define UNIT_PIECES(bits) ((bits) == 3 ? 4 : (bits) == 2 ? 2 : 1)
#define PIECE_STEPS(bits) ((bits) == 8 ? 1 : 2)
#define UNIT_STEPS(bits) (UNIT_PIECES(bits) * PIECE_STEPS(bits))

/* Bits from.. of each byte, by themselves: a shift and a mask at once. */
INLINE __m512i field(__m512i v, int bits, int from)
{
    uint64_t matrix = 0; /* byte 7 - i of it chooses the bits whose sum becomes bit i */
    UNROLL
    for (int i = 0; i < bits; i++)
        matrix |= (uint64_t)(1u << (from + i)) << (8 * (7 - i));
    return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64((long long)matrix), 0);
}

/* A piece of 16 outputs' words[0], words[stride] and words[2 stride]: vectors of [16 outputs][4 inputs], a step each. */
INLINE void unpack(int bits, int piece, const uint32_t *words, int64_t stride, __mmask16 mask, __m512i step[2])
{
    if (bits == 3) {
        /* 96 bits are four pieces of eight fields; byte i of a piece takes the 8 bits from 6i on, two fields and 2 bits. */
        const __m512i spread = _mm512_set1_epi64(0x322c2620120c0600), spread_8 = _mm512_set1_epi64(0x3a342e281a140e08);
        __m512i first = load_words(words + (piece < 2 ? 0 : piece == 2 ? stride : 2 * stride), mask);
        if (piece == 1)
            first = _mm512_shrdi_epi32(first, load_words(words + stride, mask), 24);
        else if (piece == 2)
            first = _mm512_shrdi_epi32(first, load_words(words + 2 * stride, mask), 16);
        first = _mm512_multishift_epi64_epi8(piece == 3 ? spread_8 : spread, first);
        step[0] = _mm512_and_si512(first, _mm512_set1_epi8(0x07));
        step[1] = field(first, 3, 3);
        return;
    }
    __m512i v = load_words(words, mask);
    if (bits == 8) {
        step[0] = v;
    } else if (bits == 4) {
        step[0] = _mm512_and_si512(v, _mm512_set1_epi8(0x0f));
        step[1] = _mm512_and_si512(_mm512_srli_epi32(v, 4), _mm512_set1_epi8(0x0f));
    } else {
        step[0] = piece ? field(v, 2, 4) : _mm512_and_si512(v, _mm512_set1_epi8(0x03));
        step[1] = field(v, 2, 4 * piece + 2);
    }
}

INLINE __m512 load_floats(const void *values, int type, int64_t at, __mmask16 mask)
{
    if (type == LM_F32)
        return _mm512_maskz_loadu_ps(mask, (const float *)values + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)values + at);
    if (type == LM_F16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* As most weights are: symmetric, with float16 scales. Known before the loops, it saves a fifth of a small group's time. */
static inline int is_plain(const lm_packed *w) { return !w->zeros && w->scales_type == LM_F16; }

/* The pairs of a piece's two steps in a byte each, as a lower digit that a pair shares is multiplied: in GPTQ's words of
 * 4 bits they already are. */
INLINE __m512i pairs_of(int bits, const uint32_t *words, __mmask16 mask, const __m512i step[2])
{
    return bits == 4 ? load_words(words, mask) : _mm512_or_si512(step[0], _mm512_slli_epi32(step[1], 4));
}

/* Digits of a piece of so many steps, in fours: with LM_PAIRED two steps have a third four of lower digits between them. */
#define STEP_DIGITS(steps, planes) ((planes) == LM_PAIRED ? (steps) * 3 / 2 : (steps) * (planes))

/* What a group's sums begin with: -zero times the sum of the digits, for each of 16 outputs. */
INLINE __m512i minus_zeros(int plain, const lm_packed *w, int64_t at, __mmask16 mask, int32_t sum)
{
    if (plain || !w->zeros)
        return _mm512_set1_epi32(-(1 << (w->bits - 1)) * sum);
    __m512i zeros = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w->zeros + at));
    return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-sum));
}

/* _mm512_dpbusd_epi32, for which gcc 12 copies every sum to another register and back, a fifth of the time. */
INLINE __m512i dot(__m512i sum, __m512i w, __m512i x)
{
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

INLINE __m512i broadcast(const uint8_t *digits)
{
    int32_t word;
    memcpy(&word, digits, 4);
    return _mm512_set1_epi32(word);
}

/* One group of inputs: scale_row is the row of the weight's scales that it belongs to. */
typedef struct {
    const lm_packed *w;
    const lm_input *input;
    int64_t group, scale_row;
} lm_group;

static inline void clear(const lm_input *input, int64_t columns, float *y, int64_t stride)
{
    for (int64_t r = 0; r < input->rows; r++)
        memset(y + r * stride, 0, (size_t)columns * sizeof(float));
}

/* The sum is finished by the bias, or by nothing. */
TARGET static inline void add_bias(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride)
{
    if (!w->bias)
        return;
    for (int64_t o = first; o < last; o += 16) {
        const __mmask16 mask = last - o >= 16 ? FULL : (__mmask16)((1u << (last - o)) - 1);
        const __m512 bias = load_floats(w->bias, w->bias_type, o, mask);
        for (int64_t r = 0; r < input->rows; r++) {
            float *to = y + r * stride + o - first;
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), bias));
        }
    }
}

void lm_few_avx512(const lm_packed *w, const lm_input *input, int64_t first, int64_t last, float *y, int64_t stride);

#endif
