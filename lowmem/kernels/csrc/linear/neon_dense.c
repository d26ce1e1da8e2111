/* Dense linears with NEON. */
#if defined(__aarch64__)
#define TARGET
#include "neon.h"

enum { MOST_ROWS = 4, MOST_OUTPUTS = 8 };
enum { LINE = 32, AHEAD = 512 }; /* inputs of a cache line; the prefetch distance in inputs */

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

/* A tile of s.rows rows and s.outputs outputs, from output `first` on. Each sum has the same order in every tile: 4 lanes,
 * their tree, then the last inputs that do not fill a vector. */
INLINE void tile(lm_dense_shape s, const lm_dense_piece *p, int64_t first)
{
    const lm_dense *w = p->w;
    const int64_t in = w->inputs, whole = in / 8 * 8;
    const uint16_t *weight = w->weight + first * in;
    const float *x = p->x;
    float *y = p->y + first - p->first;
    sums_of_tile sum;
    UNROLL
    for (int r = 0; r < s.rows; r++)
        UNROLL
        for (int o = 0; o < s.outputs; o++)
            sum[r][o] = vdupq_n_f32(0);
    int64_t i = 0;
    for (; i + LINE <= in; i += LINE) {
        UNROLL
        for (int o = 0; o < s.outputs; o++)
            __builtin_prefetch((const void *)((uintptr_t)(weight + o * in + i) + 2 * AHEAD));
        UNROLL
        for (int part = 0; part < LINE; part += 8)
            add_products(s, weight, p, i + part, sum);
    }
    for (; i < whole; i += 8)
        add_products(s, weight, p, i, sum);
    UNROLL
    for (int o = 0; o < s.outputs; o++)
        UNROLL
        for (int r = 0; r < s.rows; r++) {
            float total = vaddvq_f32(sum[r][o]);
            for (i = whole; i < in; i++)
                total += lm_load(weight, s.type, o * in + i) * x[r * in + i];
            y[r * p->stride + o] = w->bias ? total + lm_load(w->bias, w->bias_type, first + o) : total;
        }
}

#define OUTPUTS_1 8
#define OUTPUTS_2 6
#define OUTPUTS_3 6
#define OUTPUTS_4 4
#include "dense_columns.h"

void lm_dense_neon(const lm_dense_piece *piece) { dense_columns(piece); }
#endif
