/* Blocks of outputs: where their words, scales and results lie, and how the last one of a weight is completed. For the kernels
 * of AVX2 and NEON. */
#ifndef LOWMEM_BLOCKS_H
#define LOWMEM_BLOCKS_H

#include "kernels.h"
#include "types.h"

enum { BLOCK = 16 };   /* outputs of a register tile */
enum { WIDEST = 256 }; /* inputs of a group, at most */

/* A group of inputs; scale_row: the row of the weight's scales that it belongs to. */
typedef struct {
    const lm_packed *w;
    const lm_input *input;
    int64_t group, scale_row;
} lm_group;

static inline lm_group group_of(const lm_piece *p, int64_t group)
{
    return (lm_group){p->w, p->input, group, lm_scale_row(p->w, p->input, group)};
}

/* BLOCK outputs of one group of inputs: in the tensors, or in a `spare`. */
typedef struct {
    const uint32_t *words;
    const void *scales;
    const uint8_t *zeros; /* NULL: all are 2^(bits-1) */
    float *y;
    int64_t word_stride, y_stride;
    int64_t ahead; /* the prefetch distance in words; may point outside the tensor */
    int scales_type;
} block;

/* Memory for the last block if fewer than BLOCK outputs are left, so that nothing past the end is read or written. */
typedef struct {
    uint32_t words[WIDEST * 8 / 32 * BLOCK];
    float scales[BLOCK], y[6 * BLOCK];
    uint8_t zeros[BLOCK];
} spare;

static inline block block_of(const lm_group *at, int64_t output, float *y, int64_t y_stride)
{
    const lm_packed *w = at->w;
    const int64_t scale = lm_group_at(w, at->scale_row, output);
    return (block){.words = lm_words(w, at->group * at->input->group * w->bits / 32, output),
                   .scales = (const char *)w->scales + (size_t)scale * lm_width(w->scales_type),
                   .zeros = w->zeros ? w->zeros + scale : NULL,
                   .y = y,
                   .word_stride = lm_word_stride(w),
                   .y_stride = y_stride,
                   .scales_type = w->scales_type};
}

/* The next BLOCK outputs of the same group, not beyond the tile of the tiled layout. */
static inline block block_after(const block *b)
{
    block next = *b;
    next.words += BLOCK;
    next.scales = (const char *)b->scales + BLOCK * lm_width(b->scales_type);
    next.zeros = b->zeros ? b->zeros + BLOCK : NULL;
    next.y += BLOCK;
    return next;
}

/* The first `count` outputs of b, in the spare: scales, zeros and `rows` rows of y. */
static inline block spare_block(const block *b, int64_t count, int rows, spare *to)
{
    memset(to->scales, 0, sizeof to->scales);
    memset(to->y, 0, sizeof to->y);
    memset(to->zeros, 0, sizeof to->zeros);
    for (int64_t o = 0; o < count; o++) {
        to->scales[o] = lm_load(b->scales, b->scales_type, o);
        to->zeros[o] = b->zeros ? b->zeros[o] : 0;
    }
    for (int r = 0; r < rows; r++)
        memcpy(to->y + r * BLOCK, b->y + r * b->y_stride, (size_t)count * sizeof(float));
    return (block){b->words, to->scales, b->zeros ? to->zeros : NULL, to->y, b->word_stride, BLOCK, 0, LM_F32};
}

/* Copy the words as well. */
static inline void spare_words(const lm_group *at, block *b, int64_t count, spare *to)
{
    memset(to->words, 0, sizeof to->words);
    for (int64_t i = 0; i < (int64_t)at->input->group * at->w->bits / 32; i++)
        memcpy(to->words + i * BLOCK, b->words + i * b->word_stride, (size_t)count * sizeof(uint32_t));
    b->words = to->words;
    b->word_stride = BLOCK;
}

static inline void put_back(const block *b, int64_t count, int rows, const spare *from)
{
    for (int r = 0; r < rows; r++)
        memcpy(b->y + r * b->y_stride, from->y + r * BLOCK, (size_t)count * sizeof(float));
}

#endif
