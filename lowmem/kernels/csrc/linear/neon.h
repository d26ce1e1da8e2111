/* What the NEON kernels share: three instruction sets, which differ in how bytes are multiplied. A file that includes this has
 * defined TARGET, its function attribute. */
#ifndef LOWMEM_NEON_H
#define LOWMEM_NEON_H

#include <arm_neon.h>

#include "kernels.h"
#include "types.h"

#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLL _Pragma("GCC unroll 16")

/* Keep the order of what comes before and after: clang otherwise unpacks all vectors of a tile at once, for which there are
 * not enough registers. */
#define HOLD(value) __asm__ volatile("" : "+w"(value))

/* Inputs that are unpacked together: `bits` rows of words, STEPS steps of four inputs of each output. A group is whole
 * units. */
enum { UNIT = 32, STEPS = UNIT / 4, PAIR_STEPS = STEPS / 2 };

/* Bytes of the digits of `inputs` inputs. */
#define DIGIT_BYTES(inputs, planes) ((planes) == LM_PAIRED ? (inputs) * 3 / 2 : (inputs) * (planes))

size_t lm_digit_bytes_neon(int64_t rows, int64_t in, int planes);
void lm_quantize_neon(const lm_matrix *x, lm_input *input, int64_t first, int64_t last);
void lm_dense_neon(const lm_dense_piece *piece);
void lm_decode_neon_dotprod(const lm_piece *piece);

/* What NEON's kernels find in lm_input.sums for each group and row, in place of the sums of planes. */
enum {
    SUM_LOW,    /* of the integers, or of the lower two of three planes */
    SUM_SHARED, /* of the digits that pairs share, with LM_PAIRED */
    SUM_HIGHEST /* of the third plane */
};

/* Four numbers of any type as float32. */
INLINE float32x4_t load_4(const void *values, int type, int64_t at)
{
    if (type == LM_F32)
        return vld1q_f32((const float *)values + at);
    const uint16x4_t half = vld1_u16((const uint16_t *)values + at);
    if (type == LM_F16)
        return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

#endif
