/* Activations as pairs of 16-bit integers, for the AVX2 kernels.
 *
 * The layout is [group][row][part][pair]. A part holds the whole q, which fits in 16 bits; with 3 planes there is a part for
 * each plane. Which two inputs form a pair follows from the weight's bits (avx2_weights.h).
 */
#if defined(__x86_64__)
#include "avx2.h"
#include "digits.h"

/* 16 consecutive inputs into eight pairs. */
INLINE __m256i pairs_of(int bits, __m256i a, __m256i b)
{
    __m256i low = a, high = b; /* 2 bits: j and j + 8 */
    if (bits == 8) {
        low = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(a, b), 0xd8);
        high = _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(a, b), 0xd8);
    } else if (bits != 2) { /* 3 to 7 bits: of 8 inputs j and j + 4 */
        low = _mm256_permute2x128_si256(a, b, 0x20);
        high = _mm256_permute2x128_si256(a, b, 0x31);
    }
    return _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
}

INLINE int32_t sum_8(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

INLINE __m256i low_digit(__m256i q) { return _mm256_srai_epi32(_mm256_slli_epi32(q, 24), 24); }
INLINE __m256i without(__m256i q, __m256i digit) { return _mm256_srai_epi32(_mm256_sub_epi32(q, digit), 8); }

/* Eight integers in LM_PAIRED's form (linear.h). */
INLINE __m256i paired(__m256i q)
{
    const __m256i eight = _mm256_set1_epi32(8), fifteen = _mm256_set1_epi32(15);
    const __m256i sixteenths = _mm256_srai_epi32(_mm256_add_epi32(q, eight), 4);
    const __m256i rest = _mm256_and_si256(_mm256_shuffle_epi32(sixteenths, 0xf5), fifteen);
    const __m256i even = _mm256_add_epi32(rest, _mm256_andnot_si256(fifteen, _mm256_add_epi32(_mm256_sub_epi32(q, rest), eight)));
    return _mm256_blend_epi32(even, _mm256_slli_epi32(sixteenths, 4), 0xaa);
}

INLINE void quantize_group(int type, int planes, const lm_digit_group *g)
{
    const int32_t limit = lm_limit(planes);
    const int width = g->width;
    int16_t *digits = g->digits;
    __m256i largest = _mm256_setzero_si256(); /* compared as integers: NaN > infinity > finite numbers */
    for (int k = 0; k < width; k += 8) {
        __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(load_8(g->x, type, g->at + k)), _mm256_set1_epi32(0x7fffffff));
        largest = _mm256_max_epu32(largest, magnitude);
    }
    uint32_t each[8], most = 0;
    _mm256_storeu_si256((void *)each, largest);
    for (int i = 0; i < 8; i++)
        most = each[i] > most ? each[i] : most;
    const float a = lm_from_bits(most);
    const float inverse = lm_inverse(a, limit);
    *g->scale = a / (float)limit;
    const __m256i high = _mm256_set1_epi32(limit), low = _mm256_set1_epi32(-limit);
    __m256i sum[3] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int k = 0; k < width; k += 16) {
        __m256i part[3][2];
        for (int half = 0; half < 2; half++) {
            __m256 scaled = _mm256_mul_ps(load_8(g->x, type, g->at + k + 8 * half), _mm256_set1_ps(inverse));
            __m256i q = _mm256_max_epi32(_mm256_min_epi32(_mm256_cvtps_epi32(scaled), high), low);
            if (planes == LM_PAIRED)
                q = paired(q);
            __m256i p0 = low_digit(q), rest = without(q, p0), p1 = low_digit(rest), p2 = without(rest, p1);
            sum[0] = _mm256_add_epi32(sum[0], p0);
            sum[1] = _mm256_add_epi32(sum[1], p1);
            sum[2] = _mm256_add_epi32(sum[2], p2);
            part[0][half] = planes == 3 ? p0 : q;
            part[1][half] = p1;
            part[2][half] = p2;
        }
        for (int part_index = 0; part_index < PARTS(planes); part_index++)
            _mm256_storeu_si256((void *)(digits + part_index * width + k),
                                pairs_of(g->bits, part[part_index][0], part[part_index][1]));
    }
    for (int plane = 0; plane < LM_SUMS(planes); plane++)
        g->sums[plane] = sum_8(sum[plane]);
}

#define DIGIT_BYTES(inputs, planes) ((inputs) * PARTS(planes) * 2)
LM_QUANTIZE_ALL(avx2, TARGET, DIGIT_BYTES)

#endif
