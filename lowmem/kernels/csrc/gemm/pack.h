/* Pack a panel. Each instruction set's file includes this, with TARGET defined as its function attribute. */
#include "kernels.h"
#include "types.h"

TARGET static inline float pack_as_float(const void *source, int64_t at, int type)
{
    return type == LM_F32 ? ((const float *)source)[at] : lm_from_bf16(((const uint16_t *)source)[at]);
}

/* To the nearest bfloat16, ties to even, as 16 bits in the low half; NaN is not kept. */
TARGET static inline uint32_t pack_rounded(float value)
{
    const uint32_t bits = lm_to_bits(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

TARGET static inline uint32_t pack_as_bits(const void *source, int64_t at, int type)
{
    return type == LM_F32 ? pack_rounded(((const float *)source)[at]) : ((const uint16_t *)source)[at];
}

/* There are loops for both orders of a matrix, so that each has one stride of 1. */
TARGET static inline __attribute__((always_inline)) void pack_typed(const lm_panel *p, float *into, int type)
{
    const int64_t row = p->row, column = p->column;
    const int width = p->width, rows = p->rows;
    if (rows < width)
        memset(into, 0, (size_t)(p->words * width) * sizeof *into);
    if (row == 1) {
        for (int64_t k = 0; k < p->words; k++)
            for (int r = 0; r < rows; r++)
                into[k * width + r] = pack_as_float(p->source, k * column + r, type);
    } else {
        for (int r = 0; r < rows; r++)
            for (int64_t k = 0; k < p->words; k++)
                into[k * width + r] = pack_as_float(p->source, r * row + k * column, type);
    }
}

TARGET static void pack_floats(const lm_panel *p, void *into)
{
    if (p->type == LM_F32)
        pack_typed(p, into, LM_F32);
    else
        pack_typed(p, into, LM_BF16);
}

TARGET static inline __attribute__((always_inline)) void pack_typed_pairs(const lm_panel *p, uint32_t *into, int type)
{
    const int64_t row = p->row, column = p->column, whole = p->k / 2;
    const int width = p->width, rows = p->rows;
    if (rows < width)
        memset(into, 0, (size_t)(p->words * width) * sizeof *into);
    if (row == 1) {
        for (int64_t k = 0; k < whole; k++)
            for (int r = 0; r < rows; r++)
                into[k * width + r] = pack_as_bits(p->source, 2 * k * column + r, type) |
                                      pack_as_bits(p->source, (2 * k + 1) * column + r, type) << 16;
    } else {
        for (int r = 0; r < rows; r++)
            for (int64_t k = 0; k < whole; k++)
                into[k * width + r] = pack_as_bits(p->source, r * row + 2 * k * column, type) |
                                      pack_as_bits(p->source, r * row + (2 * k + 1) * column, type) << 16;
    }
    for (int r = 0; whole < p->words && r < rows; r++)
        into[whole * width + r] = pack_as_bits(p->source, r * row + 2 * whole * column, type);
}

TARGET __attribute__((unused)) static void pack_pairs(const lm_panel *p, void *into)
{
    if (p->type == LM_F32)
        pack_typed_pairs(p, into, LM_F32);
    else
        pack_typed_pairs(p, into, LM_BF16);
}
