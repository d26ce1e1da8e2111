/* Packed linears with NEON as every AArch64 CPU has it: products of bytes in 16 bits, added in pairs to sums of 32. */
#if defined(__aarch64__)
#define TARGET
#include "neon.h"

enum { SUMS = 8 };

/* Of outputs 0 and 1, and of outputs 2 and 3: two parts each. */
typedef struct {
    int32x4_t low, high;
} total;

INLINE int32x4_t sums_of(total sum) { return vpaddq_s32(sum.low, sum.high); }
INLINE total raise(total sum) { return (total){vshlq_n_s32(sum.low, 8), vshlq_n_s32(sum.high, 8)}; }

INLINE void hold(total *sum)
{
    HOLD(sum->low);
    HOLD(sum->high);
}

/* Four digits, for each of four outputs. */
INLINE int8x16_t spread(int8x16_t x, int lane)
{
    const int32x4_t v = vreinterpretq_s32_s8(x);
    return vreinterpretq_s8_s32(lane == 0   ? vdupq_laneq_s32(v, 0)
                                : lane == 1 ? vdupq_laneq_s32(v, 1)
                                : lane == 2 ? vdupq_laneq_s32(v, 2)
                                            : vdupq_laneq_s32(v, 3));
}

/* As many products of one lane are added in 16 bits as always fit: their largest magnitude is 128 (2^bits - 1), or 128 * 128
 * with 8 bits. */
#define CLASS(bits) ((bits) <= 5 ? 5 : (bits))
#define RUN(bits) ((bits) <= 5 ? 8 : (bits) == 6 ? 4 : (bits) == 7 ? 2 : 1)

INLINE void add_steps(int bits, int count, const int8x16_t *w, const int8x16_t *x, total *sum)
{
    const int run = RUN(bits) < count ? RUN(bits) : count;
    UNROLL
    for (int first = 0; first < count; first += run) {
        int16x8_t low = vdupq_n_s16(0), high = low;
        UNROLL
        for (int i = first; i < first + run; i++) {
            const int8x16_t y = spread(x[i / 4], i % 4);
            low = i == first ? vmull_s8(vget_low_s8(w[i]), vget_low_s8(y)) : vmlal_s8(low, vget_low_s8(w[i]), vget_low_s8(y));
            high = i == first ? vmull_high_s8(w[i], y) : vmlal_high_s8(high, w[i], y);
        }
        sum->low = vpadalq_s16(sum->low, low);
        sum->high = vpadalq_s16(sum->high, high);
    }
}

#include "neon_decode.h"

SCRATCH(5, 0, 1) SCRATCH(5, 0, 4) SCRATCH(6, 0, 1) SCRATCH(6, 0, 4) SCRATCH(7, 0, 1) SCRATCH(7, 0, 4)
SCRATCH(8, 0, 1) SCRATCH(8, 0, 4) SCRATCH(5, 1, 1) SCRATCH(5, 1, 4)

static void multiply_unpacked(const tile *t, int rows)
{
    static const plane_kernel kernels[9][2][2] = {
        [5] = {{scratch_5_0_1, scratch_5_1_1}, {scratch_5_0_4, scratch_5_1_4}}, [6] = {{scratch_6_0_1}, {scratch_6_0_4}},
        [7] = {{scratch_7_0_1}, {scratch_7_0_4}}, [8] = {{scratch_8_0_1}, {scratch_8_0_4}}};
    multiply_rows(t, rows, kernels[CLASS(t->at->w->bits)][rows != 1]);
}

#define ARRANGE(count, step) (void)(step) /* steps lie in scratch as they are unpacked */
#include "neon_prefill.h"

const lm_linear_kernels lm_linear_neon = {lm_digit_bytes_neon, lm_quantize_neon, lm_decode, lm_prefill, lm_dense_neon};

#endif
