/* Attention with AVX-512 BF16: queries and weights are rounded to bfloat16, as torch does, and sums are float32. */
#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#define WIDTH 16
#define WIDE 3
#define ITEMS 8
#define PAIRS 2
#define MULTIPLY_ADD(sum, x, w)                                                                                        \
    ((vector)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)_mm512_set1_epi32((int)(x)), (__m512bh)(w)))
#include "kernel.h"

const lm_attention_kernels lm_attention_bf16 = {1, chunk, merge};
#endif
