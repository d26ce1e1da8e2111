/* Column blocks with AVX-512. */
#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LANES 16
#define FMA(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define NAME lm_round_avx512
#include "gemm_round_slab.h"
#endif
typedef int gemm_round_avx512_is_not_empty;
