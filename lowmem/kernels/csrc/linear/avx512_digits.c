/* Activations as bytes, for the AVX-512 kernels.
 *
 * The layout is [group][row][step][plane][4 bytes]: a step is the four inputs that one dot-product instruction takes for
 * each of 16 outputs. With LM_PAIRED it is [group][row][two steps][4 bytes of one step, 4 of the other, 4 that their pairs
 * share]. Which four inputs form a step follows from how GPTQ's words unpack (avx512_weights.h):
 *
 *   8 bits   inputs 4s, 4s+1, 4s+2, 4s+3: the word unchanged
 *   4 bits   of 8 inputs the even, then the odd ones: v & 0x0f.., v >> 4 & 0x0f..
 *   3 bits   the same, after 24 bits of the stream were spread over four bytes of two fields
 *   5 to 7   the same: the plane of 4 bits decides, and the others are brought into its order
 *   2 bits   of 16 inputs j, j+4, j+8, j+12 for j = 0..3: v >> 2j & 0x03..
 */
#if defined(__x86_64__)
#include "avx512.h"
#include "digits.h"

/* Permute 16 bytes of consecutive inputs into the order of the steps. */
INLINE __m128i step_order(int bits, __m128i bytes)
{
    if (bits >= 3 && bits <= 7)
        return _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    if (bits == 2)
        return _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return bytes;
}

/* 16 integers in LM_PAIRED's form (linear.h): each one's upper digit and, twice, its pair's lower digit, as bytes. */
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

/* Permute lower digits, each present twice, into the order of the pairs: four bytes for two steps, four for the next. */
INLINE uint64_t pair_order(int bits, __m128i bytes)
{
    const __m128i order = bits == 2 ? _mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, -1, -1, -1, -1, -1, -1, -1, -1)
                                    : _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    return (uint64_t)_mm_cvtsi128_si64(_mm_shuffle_epi8(bytes, order));
}

INLINE void quantize_group(int type, int planes, const lm_digit_group *g)
{
    const int32_t limit = lm_limit(planes);
    const int width = g->width, bits = g->bits;
    uint8_t *digits = g->digits;
    __m512i largest = _mm512_setzero_si512(); /* compared as integers: NaN > infinity > finite numbers */
    for (int k = 0; k < width; k += 16) {
        __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(load_16(g->x, type, g->at + k, FULL)), _mm512_set1_epi32(0x7fffffff));
        largest = _mm512_max_epu32(largest, magnitude);
    }
    uint32_t most = _mm512_reduce_max_epu32(largest);
    const float a = lm_from_bits(most);
    const float inverse = lm_inverse(a, limit);
    *g->scale = a / (float)limit;
    const __m512i high = _mm512_set1_epi32(limit), low = _mm512_set1_epi32(-limit), round = _mm512_set1_epi32(128);
    const __m128i ones = _mm_set1_epi8(1);
    __m128i sum[3] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
    for (int k = 0; k < width; k += 16) {
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_16(g->x, type, g->at + k, FULL), _mm512_set1_ps(inverse)));
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
        g->sums[plane] = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    if (planes == LM_PAIRED) /* a pair's byte is one weight plus 16 times the other */
        g->sums[0] *= 17;
}

LM_QUANTIZE_ALL(avx512, TARGET, DIGIT_BYTES)

#endif
