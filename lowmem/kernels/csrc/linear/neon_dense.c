/* Dense linears with NEON. */
#if defined(__aarch64__)
#define TARGET
#include "neon.h"

enum { MOST_ROWS = 4, MOST_OUTPUTS = 8 };

typedef float32x4_t sums_of_tile[MOST_ROWS][MOST_OUTPUTS];

/* Eight weights as float32, four of them. */
INLINE float32x4_t half_of(int type, uint16x8_t w, int upper)
{
    if (type == LM_F16)
        return upper ? vcvt_high_f32_f16(vreinterpretq_f16_u16(w)) : vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_u16(w)));
    return vreinterpretq_f32_u32(upper ? vshll_high_n_u16(w, 16) : vshll_n_u16(vget_low_u16(w), 16));
}

INLINE void add_products(lm_dense_shape s, const uint16_t *weight, const lm_dense_piece *p, int64_t i, sums_of_tile sum)
{
    const int64_t in = p->w->inputs;
    uint16x8_t w[MOST_OUTPUTS];
    UNROLL
    for (int o = 0; o < s.outputs; o++)
        w[o] = vld1q_u16(weight + o * in + i);
    UNROLL
    for (int upper = 0; upper < 2; upper++) {
        float32x4_t x[MOST_ROWS];
        UNROLL
        for (int r = 0; r < s.rows; r++)
            x[r] = vld1q_f32(p->x + r * in + i + 4 * upper);
        UNROLL
        for (int o = 0; o < s.outputs; o++) {
            const float32x4_t v = half_of(s.type, w[o], upper);
            UNROLL
            for (int r = 0; r < s.rows; r++)
                sum[r][o] = vfmaq_f32(sum[r][o], v, x[r]);
        }
    }
}

#define ZERO vdupq_n_f32(0)
#define sum_of vaddvq_f32
#include "dense_tile.h"

#define OUTPUTS_1 8
#define OUTPUTS_2 6
#define OUTPUTS_3 6
#define OUTPUTS_4 4
#include "dense_columns.h"

void lm_dense_neon(const lm_dense_piece *piece) { dense_columns(piece); }
#endif
