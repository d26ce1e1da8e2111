/* Products, rounding and training with AVX-512. Tiles are 12 x 32: 24 sums in registers; each word of k takes two vectors of b and 12
 * values of a. */
#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LANES 16
#define FMA(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define NAME lm_round_avx512
#define TRAIN lm_train_avx512
#include "pack.h"
#include "round_slab.h"
#include "train_unit.h"

enum { ROWS = 12, COLUMNS = 32 };

#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

/* As an instruction on three registers: otherwise gcc keeps one vector of b in memory and reads it for each product, more
 * than a core can load. */
#define ADD_PRODUCT(sum, x, y) __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y))

static inline void prefetch_tile(const float *c, int64_t c_row)
{
    for (int i = 0; i < ROWS; i++) {
        __builtin_prefetch(c + i * c_row, 1);
        __builtin_prefetch(c + i * c_row + 16, 1);
        __builtin_prefetch(c + i * c_row + 31, 1);
    }
}

INLINE void add_to_tile(float *c, int64_t c_row, float alpha, __m512 sums[ROWS][2])
{
    const __m512 times = _mm512_set1_ps(alpha);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
        _mm512_storeu_ps(c + i * c_row, _mm512_fmadd_ps(times, sums[i][0], _mm512_loadu_ps(c + i * c_row)));
        _mm512_storeu_ps(c + i * c_row + 16, _mm512_fmadd_ps(times, sums[i][1], _mm512_loadu_ps(c + i * c_row + 16)));
    }
}

TARGET static void tile_floats(int64_t words, const void *pa, const void *pb, float *c, int64_t c_row, float alpha)
{
    const float *a = pa, *b = pb;
    __m512 sums[ROWS][2];
    prefetch_tile(c, c_row);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++, a += ROWS, b += COLUMNS) {
        const __m512 left = _mm512_load_ps(b), right = _mm512_load_ps(b + 16);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const __m512 value = _mm512_set1_ps(a[i]);
            ADD_PRODUCT(sums[i][0], value, left);
            ADD_PRODUCT(sums[i][1], value, right);
        }
    }
    add_to_tile(c, c_row, alpha, sums);
}

BF16 static void tile_pairs(int64_t words, const void *pa, const void *pb, float *c, int64_t c_row, float alpha)
{
    const int32_t *a = pa;
    const char *b = pb;
    __m512 sums[ROWS][2];
    prefetch_tile(c, c_row);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < words; k++, a += ROWS, b += 4 * COLUMNS) {
        const __m512bh left = (__m512bh)_mm512_load_si512(b), right = (__m512bh)_mm512_load_si512(b + 64);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const __m512bh value = (__m512bh)_mm512_set1_epi32(a[i]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], value, left);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], value, right);
        }
    }
    add_to_tile(c, c_row, alpha, sums);
}

const lm_gemm_kernels lm_gemm_avx512 = {"AVX-512", ROWS, COLUMNS, 0, pack_floats, tile_floats};
const lm_gemm_kernels lm_gemm_avx512_bf16 = {"AVX-512 BF16", ROWS, COLUMNS, 1, pack_pairs, tile_pairs};

#endif
