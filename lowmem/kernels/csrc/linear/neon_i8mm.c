/* Packed linears with NEON and its matrix product of bytes (optional from ARMv8.2 on): for many rows. An instruction
 * multiplies eight inputs of two rows by those of two outputs. Few rows are multiplied as with the dot product. */
#if defined(__aarch64__)
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#include "neon_tiles.h"

enum { OUTPUT_PAIRS = BLOCK / 2, MOST_SUMS = MOST_ROWS / 2 * OUTPUT_PAIRS };

/* Two steps of four outputs become eight inputs of two outputs, and of the other two. */
INLINE void arrange(int count, int8x16_t *step)
{
    UNROLL
    for (int i = 0; i < count; i += 2) {
        const int32x4_t a = vreinterpretq_s32_s8(step[i]), b = vreinterpretq_s32_s8(step[i + 1]);
        step[i] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        step[i + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
}
#define ARRANGE arrange

/* Sixteen digits of two rows become eight of each, and the other eight. */
INLINE void pair_rows(const int8_t *first, const int8_t *second, int8x16_t x[2])
{
    const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(first)), b = vreinterpretq_s64_s8(vld1q_s8(second));
    x[0] = vreinterpretq_s8_s64(vzip1q_s64(a, b));
    x[1] = vreinterpretq_s8_s64(vzip2q_s64(a, b));
}

/* Add the products of one plane to sum[pair of rows][pair of outputs], each two rows of two outputs. */
INLINE void add_plane(shape s, int plane, const tile *t, int32x4_t *sum)
{
    const int width = t->at->input->group, shared = s.planes == LM_PAIRED && plane == 0;
    const int steps = shared ? PAIR_STEPS : STEPS, row_pairs = (s.rows + 1) / 2;
    const int64_t row_bytes = s.rows == 1 ? 0 : DIGIT_BYTES((int64_t)width, s.planes);
    const int8_t *digits = digits_of(t, s.planes, plane), *weights = shared ? t->pairs : t->steps;
    for (int unit = 0; unit < width / UNIT; unit++, digits += 4 * steps, weights += 16 * steps * VECTORS) {
        UNROLL
        for (int i = 0; i < steps; i += 4) { /* 16 inputs, or 16 pairs */
            int8x16_t x[MOST_ROWS / 2][2];
            UNROLL
            for (int r = 0; r < row_pairs; r++)
                pair_rows(digits + 4 * i + 2 * r * row_bytes, digits + 4 * i + (2 * r + 1) * row_bytes, x[r]);
            UNROLL
            for (int o = 0; o < OUTPUT_PAIRS; o++)
                UNROLL
                for (int half = 0; half < 2; half++) {
                    const int8x16_t w = vld1q_s8(weights + 16 * (o / 2 * steps + i + 2 * half + o % 2));
                    UNROLL
                    for (int r = 0; r < row_pairs; r++)
                        sum[r * OUTPUT_PAIRS + o] = vmmlaq_s32(sum[r * OUTPUT_PAIRS + o], x[r][half], w);
                }
        }
    }
}

/* The sums of vector `v` of outputs, for one row. */
INLINE int32x4_t row_of(const int32x4_t *sum, int row, int v)
{
    const int64x2_t a = vreinterpretq_s64_s32(sum[row / 2 * OUTPUT_PAIRS + 2 * v]);
    const int64x2_t b = vreinterpretq_s64_s32(sum[row / 2 * OUTPUT_PAIRS + 2 * v + 1]);
    return vreinterpretq_s32_s64(row % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
}

INLINE void multiply(shape s, const tile *t)
{
    const int planes = LM_SUMS(s.planes), count = (s.rows + 1) / 2 * OUTPUT_PAIRS;
    int32x4_t sum[MOST_SUMS], highest[MOST_SUMS];
    UNROLL
    for (int i = 0; i < count; i++)
        highest[i] = sum[i] = vdupq_n_s32(0);
    UNROLL
    for (int plane = planes - 1; plane >= 0; plane--) {
        add_plane(s, plane, t, sum);
        UNROLL
        for (int i = 0; i < count; i++) {
            if (plane == 2)
                highest[i] = sum[i], sum[i] = vdupq_n_s32(0);
            else if (plane == 1)
                sum[i] = vshlq_n_s32(sum[i], 8);
        }
    }
    UNROLL
    for (int v = 0; v < VECTORS; v++) {
        int32x4_t low[MOST_ROWS], high[MOST_ROWS];
        UNROLL
        for (int r = 0; r < s.rows; r++) {
            low[r] = row_of(sum, r, v);
            high[r] = row_of(highest, r, v);
        }
        add_scaled(s, t, v, low, high, 1);
    }
}

#define TILE(planes, rows)                                                                                             \
    TARGET static void tile_##planes##_##rows(const tile *t) { multiply((shape){0, planes, rows, 1}, t); }
TILE(1, 1) TILE(1, 4) TILE(2, 1) TILE(2, 4) TILE(3, 1) TILE(3, 4) TILE(4, 1) TILE(4, 4) /* 4 planes: LM_PAIRED */

static void multiply_unpacked(const tile *t, int rows)
{
    static void (*const kernels[4][2])(const tile *) = {
        {tile_1_1, tile_1_4}, {tile_2_1, tile_2_4}, {tile_3_1, tile_3_4}, {tile_4_1, tile_4_4}};
    kernels[t->at->input->planes - 1][rows != 1](t);
}

#include "neon_prefill.h"

const lm_linear_kernels lm_linear_neon_i8mm = {
    lm_digit_bytes_neon, lm_quantize_neon, lm_decode_neon_dotprod, lm_prefill, lm_dense_neon,
};

#endif
