/* Weights as the AVX2 kernels unpack them.
 *
 * Both 16-bit halves of a GPTQ word hold the same number of fields, so one shift and one mask give a pair of inputs for
 * eight outputs: inputs j and j + n/2 of n = 4 (8 bits), 8 (3 to 7 bits) or 16 (2 bits) consecutive ones. avx2_digits.c
 * brings the activations into the same pairs.
 */
#ifndef LOWMEM_AVX2_WEIGHTS_H
#define LOWMEM_AVX2_WEIGHTS_H

#include "avx2.h"
#include "blocks.h"

enum { WIDE = 2 }; /* vectors of outputs of a register tile */

/* ---- unpacking ----------------------------------------------------------------------------------------------- */

/* Rows of words that unpack together, the sources that they give, and the pairs of a source. */
#define UNIT_ROWS(bits) ((bits) == 3 || IS_PLANAR(bits) ? (bits) : 1)
#define UNIT_SOURCES(bits) ((bits) == 3 || IS_PLANAR(bits) ? 4 : 1)
#define SOURCE_PAIRS(bits) ((bits) == 8 ? 2 : (bits) == 2 ? 8 : 4)
#define UNIT_PAIRS(bits) (UNIT_SOURCES(bits) * SOURCE_PAIRS(bits))

INLINE __m256i load_words(const uint32_t *words) { return _mm256_loadu_si256((const void *)words); }

/* Source `index` of a unit, for eight outputs: both halves of each word hold fields of some inputs, from the lowest bit. */
INLINE __m256i source(int bits, int index, const uint32_t *words, int64_t stride)
{
    if (IS_PLANAR(bits))
        return load_words(words + index * stride);
    if (bits != 3)
        return load_words(words);
    /* 96 bits are four pieces of eight fields. The upper four of a piece move 4 bits up, into the upper half. */
    __m256i low, high;
    if (index == 0) {
        low = load_words(words);
        high = _mm256_slli_epi32(low, 4);
    } else if (index == 1) {
        __m256i next = load_words(words + stride);
        low = _mm256_or_si256(_mm256_srli_epi32(load_words(words), 24), _mm256_slli_epi32(next, 8));
        high = _mm256_slli_epi32(next, 12);
    } else if (index == 2) {
        __m256i word = load_words(words + stride);
        low = _mm256_srli_epi32(word, 16);
        high = _mm256_or_si256(_mm256_srli_epi32(word, 12), _mm256_slli_epi32(load_words(words + 2 * stride), 20));
    } else {
        __m256i word = load_words(words + 2 * stride);
        low = _mm256_srli_epi32(word, 8);
        high = _mm256_srli_epi32(word, 4);
    }
    return _mm256_blend_epi16(low, high, 0xaa);
}

/* Each 32-bit lane moved up by `by` bits; down if that is negative. */
INLINE __m256i moved_32(__m256i v, int by) { return by >= 0 ? _mm256_slli_epi32(v, by) : _mm256_srli_epi32(v, -by); }
INLINE __m256i moved_16(__m256i v, int by) { return by >= 0 ? _mm256_slli_epi16(v, by) : _mm256_srli_epi16(v, -by); }

/* The fields of source `index` in a plane of `bits` bits (2 or 1): four in each half, from the lowest bit, and other bits
 * above them. `words`: the plane's first row. */
INLINE __m256i fields(int bits, int index, const uint32_t *words, int64_t stride)
{
    const int rows = 4 / bits, from = 8 * bits * (index % rows);
    const __m256i word = load_words(words + index / rows * stride);
    return _mm256_blend_epi16(moved_32(word, -from), moved_32(word, 16 - 4 * bits - from), 0xaa);
}

/* A planar weight's bits above the low four, for source `index`: the fields of 2 bits from bit 0 of each half, those of 1 bit
 * from bit 0 (5 bits) or 8 (7 bits). */
INLINE __m256i high_source(int bits, int index, const uint32_t *words, int64_t stride)
{
    if (!IS_PLANAR(bits))
        return _mm256_setzero_si256();
    const __m256i first = fields(bits == 5 ? 1 : 2, index, words + 4 * stride, stride);
    if (bits != 7)
        return first;
    const __m256i second = fields(1, index, words + 6 * stride, stride);
    return _mm256_blendv_epi8(_mm256_slli_epi16(second, 8), first, _mm256_set1_epi16(0x00ff));
}

/* The fields of `bits` bits from bit `from` of each half, moved to bit `to`. */
INLINE __m256i moved_fields(__m256i v, int bits, int from, int to)
{
    return _mm256_and_si256(moved_16(v, to - from), _mm256_set1_epi16((short)(((1 << bits) - 1) << to)));
}

/* Pair `index` of a source: two 16-bit integers for each output. high: of high_source. */
INLINE __m256i pair_of(int bits, int index, __m256i source, __m256i high)
{
    const int low = IS_PLANAR(bits) ? 4 : bits;
    __m256i pair = index ? _mm256_srli_epi16(source, index * low) : source;
    if (bits == 3 || index != SOURCE_PAIRS(bits) - 1) /* else the half's highest bits: nothing to mask */
        pair = _mm256_and_si256(pair, _mm256_set1_epi16((short)((1 << low) - 1)));
    if (bits == 5)
        return _mm256_or_si256(pair, moved_fields(high, 1, index, 4));
    if (bits == 6 || bits == 7)
        pair = _mm256_or_si256(pair, moved_fields(high, 2, 2 * index, 4));
    return bits == 7 ? _mm256_or_si256(pair, moved_fields(high, 1, 8 + index, 6)) : pair;
}

INLINE __m256i broadcast(const int16_t *pair)
{
    int32_t both;
    memcpy(&both, pair, 4);
    return _mm256_set1_epi32(both);
}

static inline const int16_t *digits_of(const lm_group *at, int64_t row)
{
    return (const int16_t *)at->input->digits +
           (at->group * at->input->rows + row) * at->input->group * PARTS(at->input->planes);
}

#endif
