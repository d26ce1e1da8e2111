/* Column blocks with AVX2 and FMA. */
#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define FMA(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define NAME lm_round_avx2
#include "gemm_round_slab.h"
#endif
typedef int gemm_round_avx2_is_not_empty;
