/* Copy GPTQ's tensors into the tiled layout: all rows of 64 outputs, then all rows of the next 64. */
#include <string.h>

#include "kernels.h"
#include "types.h"

typedef struct {
    const void *from; /* [rows, outputs]; NULL: nothing to copy */
    char *to;         /* [tiles][rows][LM_TILE_OUTPUTS] */
    int64_t rows;
    size_t width; /* bytes of an element */
} tensor;

typedef struct {
    int64_t out;
    tensor tensors[3];
} job;

static void copy_tile(const tensor *t, int64_t out, int64_t tile)
{
    const int64_t first = tile * LM_TILE_OUTPUTS, count = lm_min(out - first, LM_TILE_OUTPUTS);
    char *to = t->to + (size_t)(tile * t->rows) * LM_TILE_OUTPUTS * t->width;
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

void lm_tile_weight(const lm_packed *w, uint32_t *qweight, void *scales, uint8_t *zeros)
{
    const int64_t groups = w->inputs / w->group;
    job j = {w->outputs, {{w->qweight, (char *)qweight, w->inputs * w->bits / 32, 4},
                      {w->scales, scales, groups, lm_width(w->scales_type)},
                      {w->zeros, (char *)zeros, groups, 1}}};
    lm_run(copy_tiles, &j);
}
