/* Packed linears with NEON and its dot product of bytes (ARMv8.4, and most CPUs of ARMv8.2). */
#if defined(__aarch64__)
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#include "neon.h"

enum { SUMS = 16 };

typedef int32x4_t total;

INLINE int32x4_t sums_of(total sum) { return sum; }
INLINE total raise(total sum) { return vshlq_n_s32(sum, 8); }
INLINE void hold(total *sum) { HOLD(*sum); }

INLINE int32x4_t dot(int32x4_t sum, int8x16_t w, int8x16_t x, int lane)
{
    return lane == 0   ? vdotq_laneq_s32(sum, w, x, 0)
           : lane == 1 ? vdotq_laneq_s32(sum, w, x, 1)
           : lane == 2 ? vdotq_laneq_s32(sum, w, x, 2)
                       : vdotq_laneq_s32(sum, w, x, 3);
}

INLINE void add_steps(int bits, int count, const int8x16_t *w, const int8x16_t *x, total *sum)
{
    (void)bits;
    UNROLL
    for (int i = 0; i < count; i++)
        *sum = dot(*sum, w[i], x[i / 4], i % 4);
}

#include "neon_decode.h"

SCRATCH(8, 0, 1) SCRATCH(8, 0, 4) SCRATCH(8, 1, 1) SCRATCH(8, 1, 4) /* for all widths */

static void multiply_unpacked(const tile *t, int rows)
{
    static const plane_kernel kernels[2][2] = {{scratch_8_0_1, scratch_8_1_1}, {scratch_8_0_4, scratch_8_1_4}};
    multiply_rows(t, rows, kernels[rows != 1]);
}

#define ARRANGE(count, step) (void)(step) /* steps lie in scratch as they are unpacked */
#include "neon_prefill.h"

void lm_decode_neon_dotprod(const lm_piece *piece) { lm_decode(piece); }

const lm_linear_kernels lm_linear_neon_dotprod = {
    lm_digit_bytes_neon, lm_quantize_neon, lm_decode, lm_prefill, lm_dense_neon,
};

#endif
