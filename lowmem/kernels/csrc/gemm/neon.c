/* Products and rounding with NEON. Tiles are 8 x 12: 24 sums in registers; each word of k takes three vectors of b and two
 * of a. */
#if defined(__aarch64__)
#include <arm_neon.h>

#define TARGET
#define LANES 4
#define FMA(a, b, c) ((vec)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define NAME lm_round_neon
#include "pack.h"
#include "round_slab.h"

enum { ROWS = 8, COLUMNS = 12, WIDE = COLUMNS / 4 };

/* sum += x[lane] * y. */
static inline __attribute__((always_inline)) float32x4_t add(float32x4_t sum, float32x4_t y, float32x4_t x, int lane)
{
    return lane == 0   ? vfmaq_laneq_f32(sum, y, x, 0)
           : lane == 1 ? vfmaq_laneq_f32(sum, y, x, 1)
           : lane == 2 ? vfmaq_laneq_f32(sum, y, x, 2)
                       : vfmaq_laneq_f32(sum, y, x, 3);
}

static void tile(int64_t words, const void *pa, const void *pb, float *c, int64_t c_row, float alpha)
{
    const float *a = pa, *b = pb;
    float32x4_t sums[ROWS][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
        sums[i][0] = sums[i][1] = sums[i][2] = vdupq_n_f32(0);
    for (int64_t k = 0; k < words; k++, a += ROWS, b += COLUMNS) {
        const float32x4_t x[2] = {vld1q_f32(a), vld1q_f32(a + 4)};
        const float32x4_t y[WIDE] = {vld1q_f32(b), vld1q_f32(b + 4), vld1q_f32(b + 8)};
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
            for (int j = 0; j < WIDE; j++)
                sums[i][j] = add(sums[i][j], y[j], x[i / 4], i % 4);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++, c += c_row)
#pragma GCC unroll 3
        for (int j = 0; j < WIDE; j++)
            vst1q_f32(c + 4 * j, vfmaq_n_f32(vld1q_f32(c + 4 * j), sums[i][j], alpha));
}

const lm_gemm_kernels lm_gemm_neon = {"NEON", ROWS, COLUMNS, 0, pack_floats, tile};

#endif
