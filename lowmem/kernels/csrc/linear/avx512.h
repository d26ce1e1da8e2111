/* What the AVX-512 kernels share. */
#ifndef LOWMEM_AVX512_H
#define LOWMEM_AVX512_H

#include <immintrin.h>

#include "kernels.h"
#include "types.h"

#define TARGET                                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 16")

/* Bytes of the digits of `inputs` inputs. */
#define DIGIT_BYTES(inputs, planes) ((planes) == LM_PAIRED ? (inputs) * 3 / 2 : (inputs) * (planes))

size_t lm_digit_bytes_avx512(int64_t rows, int64_t in, int planes);
void lm_quantize_avx512(const lm_matrix *x, lm_input *input, int64_t first, int64_t last);
void lm_decode_avx512(const lm_piece *piece);
void lm_dense_avx512(const lm_dense_piece *piece);

enum { FULL = 0xffff };

/* A mask of the first `count` of 16 lanes. */
static inline __mmask16 first_lanes(int64_t count)
{
    return count >= 16 ? FULL : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* 16 numbers of any type as float32; those outside the mask are 0 and are not read. */
INLINE __m512 load_16(const void *values, int type, int64_t at, __mmask16 mask)
{
    if (type == LM_F32)
        return mask == FULL ? _mm512_loadu_ps((const float *)values + at)
                            : _mm512_maskz_loadu_ps(mask, (const float *)values + at);
    const uint16_t *from = (const uint16_t *)values + at;
    const __m256i half = mask == FULL ? _mm256_loadu_si256((const void *)from) : _mm256_maskz_loadu_epi16(mask, from);
    if (type == LM_F16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

#endif
