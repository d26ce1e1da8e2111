/* What the kernels with AVX2 have in common. */
#ifndef LOWMEM_AVX2_H
#define LOWMEM_AVX2_H

#include <immintrin.h>

#include "lowmem.h"
#include "types.h"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 16")

/* The value is in a register at this point of the program: gcc otherwise takes all products of a tile first and their
 * additions afterwards, for which there are not registers enough. */
#define HOLD(value) __asm__ volatile("" : "+x"(value))

#define PARTS(planes) ((planes) == 3 ? 3 : 1) /* arrays of digits (digits_avx2.c) */

size_t lm_digit_bytes_avx2(int64_t rows, int64_t in, int planes);
void lm_quantize_avx2(const void *x, int x_type, int64_t stride, lm_input *input, int64_t first, int64_t last);
void lm_dense_avx2(const lm_dense *w, const float *x, int64_t rows, int64_t first, int64_t last, float *y, int64_t stride);

/* Eight numbers of any type. */
INLINE __m256 load_8(const void *values, int type, int64_t at)
{
    if (type == LM_F32)
        return _mm256_loadu_ps((const float *)values + at);
    __m128i half = _mm_loadu_si128((const void *)((const uint16_t *)values + at));
    if (type == LM_F16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

#endif
