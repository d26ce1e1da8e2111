/* What the AVX2 kernels share. */
#ifndef LOWMEM_AVX2_H
#define LOWMEM_AVX2_H

#include <immintrin.h>

#include "kernels.h"
#include "types.h"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 16")

/* Keep the value in a register at this point: gcc otherwise computes all products of a tile before their additions, for
 * which there are not enough registers. */
#define HOLD(value) __asm__ volatile("" : "+x"(value))

#define PARTS(planes) ((planes) == 3 ? 3 : 1) /* arrays of digits (avx2_digits.c) */

size_t lm_digit_bytes_avx2(int64_t rows, int64_t in, int planes);
void lm_quantize_avx2(const lm_matrix *x, lm_input *input, int64_t first, int64_t last);
void lm_dense_avx2(const lm_dense_piece *piece);

/* Eight numbers of any type as float32. */
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
