/* Activations as bytes, for the kernels with AVX-512.
 *
 * Digits lie as [group][row][step][plane][4 bytes]: a step is the four inputs that one dot-product instruction takes of
 * each of 16 outputs. With LM_PAIRED as [group][row][two steps][4 bytes of one, of the other, and of what their pairs share].
 * Which four they are follows from how GPTQ's words come apart (weights_avx512.h):
 *
 *   8 bits   inputs 4s, 4s+1, 4s+2, 4s+3: the word as it is
 *   4 bits   of 8 inputs the even, then the odd ones: v & 0x0f.., v >> 4 & 0x0f..
 *   3 bits   the same, after 24 bits of the stream have been spread over four bytes of two fields
 *   2 bits   of 16 inputs j, j+4, j+8, j+12 for j = 0..3: v >> 2j & 0x03..
 */
#if defined(__x86_64__)
#include <string.h>

#include "avx512.h"
#include "digits.h"
#include "types.h"

size_t lm_digit_bytes_avx512(int64_t rows, int64_t in, int planes) { return (size_t)DIGIT_BYTES(rows * in, planes); }

INLINE __m512 load_x(const void *x, int type, int64_t at)
{
    if (type == LM_F32)
        return _mm512_loadu_ps((const float *)x + at);
    __m256i half = _mm256_loadu_si256((const void *)((const uint16_t *)x + at));
    if (type == LM_F16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* 16 bytes of consecutive inputs into the order of the steps. */
INLINE __m128i step_order(int bits, __m128i bytes)
{
    if (bits == 4 || bits == 3)
        return _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    if (bits == 2)
        return _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return bytes;
}

/* 16 integers as LM_PAIRED holds them (lowmem.h): the bytes of each one's upper digit and, twice, of its pair's lower one. */
INLINE void pair_digits(__m512i q, __m128i *upper, __m128i *lower)
{
    const __mmask16 odd = 0xaaaa;
    const __m512i eight = _mm512_set1_epi32(8), fifteen = _mm512_set1_epi32(15);
    const __m512i sixteenths = _mm512_srai_epi32(_mm512_add_epi32(q, eight), 4);
    const __m512i rest = _mm512_and_si512(_mm512_shuffle_epi32(sixteenths, 0xf5), fifteen);
    const __m512i even = _mm512_add_epi32(rest, _mm512_andnot_si512(fifteen, _mm512_add_epi32(_mm512_sub_epi32(q, rest), eight)));
    const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(_mm512_shuffle_epi32(even, 0xa0), 24), 24);
    q = _mm512_mask_slli_epi32(even, odd, sixteenths, 4);
    q = _mm512_sub_epi32(q, _mm512_mask_slli_epi32(digit, odd, digit, 4));
    *upper = _mm512_cvtepi32_epi8(_mm512_srai_epi32(q, 8));
    *lower = _mm512_cvtepi32_epi8(digit);
}

/* Lower digits, each there twice, into the order of the pairs: four bytes for two steps, and for the next two. */
INLINE uint64_t pair_order(int bits, __m128i bytes)
{
    const __m128i order = bits == 2 ? _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, -1, -1, -1, -1, -1, -1, -1, -1)
                                    : _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    return (uint64_t)_mm_cvtsi128_si64(_mm_shuffle_epi8(bytes, order));
}

INLINE void quantize_group(const void *x, int type, int64_t at, int width, int bits, int planes, uint8_t *digits,
                           float *scale, int32_t *sums)
{
    const int32_t limit = lm_limit(planes);
    __m512i largest = _mm512_setzero_si512(); /* as integers: NaN above infinity above all that is finite */
    for (int k = 0; k < width; k += 16) {
        __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(load_x(x, type, at + k)), _mm512_set1_epi32(0x7fffffff));
        largest = _mm512_max_epu32(largest, magnitude);
    }
    uint32_t most = _mm512_reduce_max_epu32(largest);
    const float a = lm_from_bits(most);
    const float inverse = lm_inverse(a, limit);
    *scale = a / (float)limit;
    const __m512i high = _mm512_set1_epi32(limit), low = _mm512_set1_epi32(-limit), round = _mm512_set1_epi32(128);
    const __m128i ones = _mm_set1_epi8(1);
    __m128i sum[3] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
    for (int k = 0; k < width; k += 16) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_x(x, type, at + k), _mm512_set1_ps(inverse)));
        q = _mm512_max_epi32(_mm512_min_epi32(q, high), low);
        __m128i p[3];
        if (planes == LM_PAIRED) {
            __m128i lower;
            pair_digits(q, &p[1], &lower);
            const uint64_t pairs = pair_order(bits, lower);
            const __m128i steps = step_order(bits, p[1]);
            sum[0] = _mm_dpbusd_epi32(sum[0], ones, _mm_cvtsi64_si128((long long)pairs));
            sum[1] = _mm_dpbusd_epi32(sum[1], ones, steps);
            _mm_storel_epi64((void *)digits, steps);
            memcpy(digits + 8, &pairs, 4);
            _mm_storel_epi64((void *)(digits + 12), _mm_unpackhi_epi64(steps, steps));
            memcpy(digits + 20, (const char *)&pairs + 4, 4);
            digits += 24;
            continue;
        }
        for (int plane = 0; plane < planes; plane++) {
            p[plane] = step_order(bits, _mm512_cvtepi32_epi8(q));
            sum[plane] = _mm_dpbusd_epi32(sum[plane], ones, p[plane]);
            q = _mm512_srai_epi32(_mm512_add_epi32(q, round), 8);
        }
        if (planes == 1) {
            _mm_storeu_si128((void *)digits, p[0]);
        } else if (planes == 2) {
            _mm_storeu_si128((void *)digits, _mm_unpacklo_epi32(p[0], p[1]));
            _mm_storeu_si128((void *)(digits + 16), _mm_unpackhi_epi32(p[0], p[1]));
        } else {
            int32_t words[3][4];
            for (int plane = 0; plane < 3; plane++)
                _mm_storeu_si128((void *)words[plane], p[plane]);
            for (int step = 0; step < 4; step++)
                for (int plane = 0; plane < 3; plane++)
                    memcpy(digits + 12 * step + 4 * plane, &words[plane][step], 4);
        }
        digits += 16 * planes;
    }
    for (int plane = 0; plane < LM_SUMS(planes); plane++) {
        __m128i s = _mm_add_epi32(sum[plane], _mm_shuffle_epi32(sum[plane], 0x4e));
        sums[plane] = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    if (planes == LM_PAIRED) /* a pair's byte holds one weight once and the other 16 times */
        sums[0] *= 17;
}

LM_QUANTIZE_ALL(TARGET, lm_quantize_avx512, uint8_t, DIGIT_BYTES)

#endif
