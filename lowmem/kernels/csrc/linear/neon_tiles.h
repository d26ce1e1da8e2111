/* Tiles of rows and outputs, as all NEON kernels of packed linears see them: where their weights and digits are, and how sums
 * become outputs. */
#ifndef LOWMEM_NEON_TILES_H
#define LOWMEM_NEON_TILES_H

#include "neon_weights.h"

enum { MOST_ROWS = 4, VECTORS = BLOCK / 4 };

/* What a kernel is compiled for. All calls pass constants, and all functions that take it are inlined. */
typedef struct {
    int bits, planes;
    int rows;     /* of a tile */
    int unpacked; /* the weights are in scratch; `bits` is their class */
} shape;

/* Some rows and a block of outputs, for one group of inputs. */
typedef struct {
    const lm_group *at;
    const block *b;
    int64_t row;
    const int8_t *steps, *pairs; /* the block's weights in scratch: [unit][vector of outputs][step] */
} tile;

static inline int64_t index_of(const tile *t) { return t->at->group * t->at->input->rows + t->row; }

/* The first digit of a plane, of the tile's first row. */
static inline const int8_t *digits_of(const tile *t, int planes, int plane)
{
    const int64_t width = t->at->input->group;
    const int8_t *digits = (const int8_t *)t->at->input->digits + index_of(t) * DIGIT_BYTES(width, planes);
    return digits + (planes == LM_PAIRED ? 1 - plane : plane) * width;
}

/* A unit's weights for vector `v` of outputs. */
INLINE void load_unit(shape s, const tile *t, int unit, int v, int8x16_t step[STEPS], int8x16_t pair[PAIR_STEPS])
{
    if (!s.unpacked) {
        const uint32_t *words = t->b->words + unit * s.bits * t->b->word_stride + 4 * v;
        unpack_signed(s.bits, s.planes, words, t->b->word_stride, step, pair);
        return;
    }
    const int8_t *steps = t->steps + 16 * STEPS * (unit * VECTORS + v);
    const int8_t *pairs = t->pairs + 16 * PAIR_STEPS * (unit * VECTORS + v);
    UNROLL
    for (int i = 0; i < STEPS; i++)
        step[i] = vld1q_s8(steps + 16 * i);
    UNROLL
    for (int i = 0; i < PAIR_STEPS; i++)
        pair[i] = s.planes == LM_PAIRED ? vld1q_s8(pairs + 16 * i) : step[0];
}

/* The zero-points of vector `v`. */
INLINE uint32x4_t zeros_of(const tile *t, int v)
{
    if (!t->b->zeros)
        return vdupq_n_u32(1u << (t->at->w->bits - 1));
    uint32_t four;
    memcpy(&four, t->b->zeros + 4 * v, sizeof four);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}

/* The sums of (w - zero) q from those of w q. total: of the digits; signed_total: of those whose weights are 128 less. */
INLINE float32x4_t less_zeros(int32x4_t sum, uint32x4_t zeros, int32_t total, int32_t signed_total)
{
    const uint32x4_t raised = vaddq_u32(vreinterpretq_u32_s32(sum), vdupq_n_u32((uint32_t)signed_total * 128));
    return vcvtq_f32_s32(vreinterpretq_s32_u32(vmlsq_n_u32(raised, zeros, (uint32_t)total)));
}

/* Where a tile's outputs and scales are, in local variables: stores to y may alias everything else. */
typedef struct {
    float *y;
    const float *scales; /* of the rows */
    const int32_t *sums;
    int64_t stride;
    int bits;
} results;

INLINE results results_of(const tile *t)
{
    const lm_input *input = t->at->input;
    return (results){t->b->y, input->scales + index_of(t), input->sums + 3 * index_of(t), t->b->y_stride, t->at->w->bits};
}

/* y = fmaf(c, scale * weight_scale, y) for vector `v`, from its rows' sums, `step` apart: of the lower planes and of the
 * third. */
INLINE void add_scaled(shape s, const tile *t, int v, const int32x4_t *low, const int32x4_t *highest, int step)
{
    const results to = results_of(t);
    const uint32x4_t zeros = zeros_of(t, v);
    const float32x4_t weight_scale = load_4(t->b->scales, t->b->scales_type, 4 * v);
    UNROLL
    for (int r = 0; r < s.rows; r++) {
        const int32_t *sums = to.sums + 3 * r;
        float *y = to.y + r * to.stride + 4 * v;
        const int32_t reduced = to.bits == 8 ? sums[SUM_LOW] : s.planes == LM_PAIRED && to.bits == 4 ? sums[SUM_SHARED] : 0;
        float32x4_t c = less_zeros(low[r * step], zeros, sums[SUM_LOW], reduced);
        if (s.planes == 3) {
            const int32_t total = sums[SUM_HIGHEST];
            c = vfmaq_f32(c, less_zeros(highest[r * step], zeros, total, to.bits == 8 ? total : 0), vdupq_n_f32(65536));
        }
        const float32x4_t scale = vmulq_n_f32(weight_scale, to.scales[r]);
        vst1q_f32(y, vfmaq_f32(vld1q_f32(y), c, scale));
    }
}

#endif
