/* What the kernels with AVX-512 have in common. */
#ifndef LOWMEM_AVX512_H
#define LOWMEM_AVX512_H

#include <immintrin.h>

#include "lowmem.h"

#define TARGET                                                                                                          \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2,gfni,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 16")

/* Bytes of so many inputs' digits. */
#define DIGIT_BYTES(inputs, planes) ((planes) == LM_PAIRED ? (inputs) * 3 / 2 : (inputs) * (planes))

size_t lm_digit_bytes_avx512(int64_t rows, int64_t in, int planes);
void lm_quantize_avx512(const void *x, int x_type, int64_t stride, lm_input *input, int64_t first, int64_t last);
void lm_dense_avx512(const lm_dense *w, const float *x, int64_t rows, int64_t first, int64_t last, float *y, int64_t stride);

#endif
