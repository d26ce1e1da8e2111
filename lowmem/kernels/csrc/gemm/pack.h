/* Pack a panel. Each instruction set's file includes this, with TARGET defined as its function attribute. */
#include "kernels.h"
#include "types.h"

typedef uint32_t __attribute__((may_alias)) lm_word; /* the bits of a float, or two bfloat16 */

/* A number to the nearest bfloat16, ties to even, in the low half; NaN is not kept. */
TARGET static inline uint32_t pack_bf16(const void *source, int64_t at, int type)
{
    if (type == LM_BF16)
        return ((const uint16_t *)source)[at];
    const uint32_t bits = ((const lm_word *)source)[at];
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* The word at `at`: a float32, or the bfloat16 there and the one `next` values on. */
TARGET static inline uint32_t pack_word(const void *source, int type, int pairs, int64_t at, int64_t next)
{
    if (pairs)
        return pack_bf16(source, at, type) | pack_bf16(source, at + next, type) << 16;
    return type == LM_F32 ? ((const lm_word *)source)[at] : (uint32_t)((const uint16_t *)source)[at] << 16;
}

TARGET static inline __attribute__((always_inline)) void pack(const lm_panel *p, int type, int pairs, lm_word *restrict into)
{
    const void *source = p->source;
    const int64_t row = p->row, column = p->column, step = pairs ? 2 * column : column;
    const int64_t whole = pairs ? p->k / 2 : p->k;
    const int width = p->width, rows = p->rows;
    if (rows < width)
        memset(into, 0, (size_t)(p->words * width) * sizeof *into);
    if (row == 1) { /* each order of the loops has one stride of 1 */
        for (int64_t k = 0; k < whole; k++)
            for (int r = 0; r < rows; r++)
                into[k * width + r] = pack_word(source, type, pairs, k * step + r, column);
    } else {
        for (int r = 0; r < rows; r++)
            for (int64_t k = 0; k < whole; k++)
                into[k * width + r] = pack_word(source, type, pairs, r * row + k * step, column);
    }
    for (int r = 0; whole < p->words && r < rows; r++) /* the last word is half full */
        into[whole * width + r] = pack_bf16(source, r * row + whole * step, type);
}

#define PACK(name, pairs)                                                                                              \
    TARGET __attribute__((unused)) static void name(const lm_panel *p, void *into)                                     \
    {                                                                                                                  \
        if (p->type == LM_F32)                                                                                         \
            pack(p, LM_F32, pairs, into);                                                                              \
        else                                                                                                           \
            pack(p, LM_BF16, pairs, into);                                                                             \
    }
PACK(pack_floats, 0)
PACK(pack_pairs, 1)
