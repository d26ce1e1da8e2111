/* Attention with AVX2, in float32. */
#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define WIDE 2
#define ITEMS 4
#define PAIRS 1
#define MULTIPLY_ADD(sum, x, w) ((vector)_mm256_fmadd_ps(_mm256_broadcast_ss((const float *)&(x)), (__m256)(w), (__m256)(sum)))
#include "kernel.h"

const lm_attention_kernels lm_attention_avx2 = {0, chunk, merge};
#endif
