/* Copy GPTQ's tensors into the tiled layout: all rows of 64 outputs, then all rows of the next 64. */
#include <string.h>

#include "kernels.h"
#include "types.h"

typedef struct {
    const void *from; /* [rows, outputs]; NULL: nothing to copy */
    char *to;         /* [tiles][rows][LM_TILE_OUTPUTS] */
    int64_t rows;
    size_t width; /* bytes of an element */
    int planes;   /* words of 3 bits in planes, to become a stream */
} tensor;

typedef struct {
    int64_t out;
    tensor tensors[3];
} job;

/* Three rows of words with 32 inputs of `count` outputs: from planes of 2 bits and 1 bit to a stream of 3 bits. */
static void to_stream(const uint32_t *from, int64_t stride, int64_t count, uint32_t (*to)[LM_TILE_OUTPUTS])
{
    uint32_t planes[3][LM_TILE_OUTPUTS] = {{0}}, stream[3][LM_TILE_OUTPUTS] = {{0}};
    for (int row = 0; row < 3; row++)
        memcpy(planes[row], from + row * stride, (size_t)count * sizeof **planes);
    for (int i = 0; i < 32; i++) {
        const int word = 3 * i / 32, at = 3 * i % 32;
        for (int o = 0; o < LM_TILE_OUTPUTS; o++) {
            const uint32_t value = (planes[i / 16][o] >> (2 * i % 32) & 3) | (planes[2][o] >> i & 1) << 2;
            stream[word][o] |= value << at;
            if (at > 29) /* the rest is in the next word */
                stream[word + 1][o] |= value >> (32 - at);
        }
    }
    memcpy(to, stream, sizeof stream);
}

static void copy_tile(const tensor *t, int64_t out, int64_t tile)
{
    const int64_t first = tile * LM_TILE_OUTPUTS, count = lm_min(out - first, LM_TILE_OUTPUTS);
    char *to = t->to + (size_t)(tile * t->rows) * LM_TILE_OUTPUTS * t->width;
    if (t->planes) {
        for (int64_t r = 0; r < t->rows; r += 3, to += 3 * LM_TILE_OUTPUTS * t->width)
            to_stream((const uint32_t *)t->from + r * out + first, out, count, (uint32_t (*)[LM_TILE_OUTPUTS])(void *)to);
        return;
    }
    for (int64_t r = 0; r < t->rows; r++, to += LM_TILE_OUTPUTS * t->width) {
        memcpy(to, (const char *)t->from + (size_t)(r * out + first) * t->width, (size_t)count * t->width);
        if (count < LM_TILE_OUTPUTS)
            memset(to + (size_t)count * t->width, 0, (size_t)(LM_TILE_OUTPUTS - count) * t->width);
    }
}

static void copy_tiles(void *context, lm_team *team)
{
    const job *j = context;
    for (int64_t tile; (tile = lm_next(team)) * LM_TILE_OUTPUTS < j->out;)
        for (int i = 0; i < 3; i++)
            if (j->tensors[i].from)
                copy_tile(&j->tensors[i], j->out, tile);
    lm_barrier(team);
}

static void tile_weight(const lm_packed *w, int planes, uint32_t *qweight, void *scales, uint8_t *zeros)
{
    const int64_t groups = w->inputs / w->group;
    job j = {w->outputs, {{w->qweight, (char *)qweight, w->inputs * w->bits / 32, 4, planes},
                      {w->scales, scales, groups, lm_width(w->scales_type), 0},
                      {w->zeros, (char *)zeros, groups, 1, 0}}};
    lm_run(copy_tiles, &j);
}

void lm_tile_weight(const lm_packed *w, uint32_t *qweight, void *scales, uint8_t *zeros)
{
    tile_weight(w, 0, qweight, scales, zeros);
}

void lm_tile_planes(const lm_packed *w, uint32_t *qweight, void *scales, uint8_t *zeros)
{
    tile_weight(w, 1, qweight, scales, zeros);
}
