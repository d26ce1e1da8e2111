/* Products, rounding and training with AVX2 and FMA. Tiles are 6 x 16: 12 sums in registers. */
#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define FMA(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define NAME lm_round_avx2
#define TRAIN lm_train_avx2
#include "pack.h"
#include "round_slab.h"
#include "train_unit.h"

enum { ROWS = 6, COLUMNS = 16 };

TARGET static void tile(int64_t words, const void *pa, const void *pb, float *c, int64_t c_row, float alpha)
{
    const float *a = pa, *b = pb;
    __m256 sums[ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
        sums[i][0] = sums[i][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < words; k++, a += ROWS, b += COLUMNS) {
        const __m256 left = _mm256_load_ps(b), right = _mm256_load_ps(b + 8);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const __m256 value = _mm256_set1_ps(a[i]);
            sums[i][0] = _mm256_fmadd_ps(value, left, sums[i][0]);
            sums[i][1] = _mm256_fmadd_ps(value, right, sums[i][1]);
        }
    }
    const __m256 times = _mm256_set1_ps(alpha);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++, c += c_row) {
        _mm256_storeu_ps(c, _mm256_fmadd_ps(times, sums[i][0], _mm256_loadu_ps(c)));
        _mm256_storeu_ps(c + 8, _mm256_fmadd_ps(times, sums[i][1], _mm256_loadu_ps(c + 8)));
    }
}

const lm_gemm_kernels lm_gemm_avx2 = {"AVX2", ROWS, COLUMNS, 0, pack_floats, tile};

#endif
